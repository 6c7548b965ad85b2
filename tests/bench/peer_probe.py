"""Runs in a peer's environment, which has torch and no sae_kernels: what its contestant does.

PYTHONPATH=sae_kernels/bench python peer_probe.py NAME INPUTS OUT STEPS
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

ARCHITECTURES, DTYPES = ("topk", "batch_topk", "jumprelu"), ("float32", "bfloat16")


class Enough(Exception):
    """Raised where a batch is asked for."""


def main(name: str, inputs: str, out: str, steps: int) -> None:
    """Leaves, by architecture and dtype, what was found or why there is nothing."""
    tensors = torch.load(inputs, weights_only=True)
    x, given = tensors.pop("x"), tensors
    unable = import_module("contestants.contestant").Unable
    found: dict[str, Any] = {}
    for architecture in ARCHITECTURES:
        for dtype in DTYPES:
            try:
                found[f"{architecture} {dtype}"] = probe(name, architecture, dtype, x, given, steps)
            except unable as answer:
                found[f"{architecture} {dtype}"] = str(answer)
    torch.save(found, out)


def probe(
    name: str, architecture: str, dtype: str, x: torch.Tensor, given: dict[str, Any], steps: int
) -> dict[str, Any]:
    """Codes, reconstructions and the last of some training steps."""
    contestant_of = import_module(f"contestants.{name}").contestant
    task = import_module("contestants.contestant").Task(
        "step", "step", architecture, given["values"].shape[1], dtype, "cpu", {}
    )
    decoding = contestant_of(task._replace(operation="decode", mode="inference"), given)
    contestant = contestant_of(task, given)
    found = {"weights": contestant.weights(), "decoded": decoding.decode().detach()}
    with torch.no_grad(), task.autocast():
        found["codes"] = contestant.dense(contestant.encode(x)).float()
        found["x_hat"] = contestant.forward(x).float()
    contestant.backward(x)
    found["gradient"] = contestant.gradient()
    for parameter in contestant.parameters():
        parameter.grad = None
    found["asked"] = train(contestant, x, steps, found)
    contestant.train(iter([x]))  # a loop that ends by itself
    return found


def train(contestant: Any, x: torch.Tensor, steps: int, found: dict[str, Any]) -> int:
    """Trains until it is stopped from within; notes the last step. How often it asked."""
    asked = 0

    def batches() -> Iterator[torch.Tensor]:
        nonlocal asked
        while True:
            asked += 1
            if asked == steps:
                found["start"], before = contestant.weights(), contestant.trained()
            if asked > steps:
                found["moved"] = contestant.trained() - before
                raise Enough
            yield x

    try:
        contestant.train(batches())
    except Enough:
        return asked
    raise RuntimeError("the loop went on without a batch")


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
