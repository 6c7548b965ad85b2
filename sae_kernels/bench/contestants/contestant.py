"""The interface that every benchmarked library implements.

This folder is also imported alone, in the environments of other packages: nothing in it may import
sae_kernels but the modules that run ours, and no module may import more than it runs.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

Tensors = dict[str, torch.Tensor]
WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
LR = 1e-4  # where the library has no default of its own: it costs the same at any


class Task(NamedTuple):
    """A task for a contestant, read from JSON.

    Attributes:
        operation: "encode", "decode" (of given codes), "sae" (both), "step" (a training step), or
            what a machine can do at best: "product" (the encoder's alone), "copy" (of memory).
        mode: "inference", "forward" (as for training, with a graph), "backward" (with the forward
            pass before it) or "step".
        architecture: "topk", "batch_topk", "jumprelu" or "relu".
        k: latents kept per token (jumprelu and relu: how many the data is made for).
        dtype: "float32", or "bfloat16" for products in it with fp32 weights.
        device: "cpu" or "cuda".
        options: of the architecture: threshold, bandwidth, coefficient; of the contestant: which
            backend of ours, whether dense passes are compiled, the level to accelerate a peer at.
    """

    operation: str
    mode: str
    architecture: str
    k: int
    dtype: str
    device: str
    options: dict[str, Any]

    def autocast(self) -> AbstractContextManager[Any]:
        """torch's autocast to bf16 where the dtype asks for it."""
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device, torch.bfloat16)


class Contestant:
    """Runs a task, once for each batch it gets.

    The methods here do so with a module ``sae`` of the library whose codes are dense [B, F];
    subclasses override what differs.

    Args:
        task: what to do.
        tensors: of the device, fp32: W_enc [F, D], b_enc [F], W_dec [F, D], b_dec [D] to start
            from, and codes to decode: values [B, k] and indices int64 [B, k]. Not to be changed.

    Raises:
        Unable: this library cannot do this task here; the message says why.
    """

    sae: Any

    def __init__(self, task: Task, tensors: Tensors) -> None:
        self.task, self.tensors = task, tensors

    def encode(self, x: torch.Tensor) -> Any:
        """Codes of x [B, D], selected as in training, in the library's own form."""
        return self.sae.encode(x)

    def decode(self) -> torch.Tensor:
        """Reconstruction [B, D] of the given codes."""
        x_hat: torch.Tensor = self.sae.decode(self.given)
        return x_hat

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Reconstruction [B, D] of x [B, D]."""
        x_hat: torch.Tensor = self.sae(x)
        return x_hat

    def parameters(self) -> list[torch.Tensor]:
        """The tensors that have gradients."""
        return list(self.sae.parameters())

    def train(self, batches: Iterator[torch.Tensor]) -> None:
        """Trains on the batches by the library's own loop, one step per batch."""
        for x in batches:
            self.step(x)

    def step(self, x: torch.Tensor) -> object:
        """Runs a training step on x [B, D], for libraries without a training loop."""
        raise Unable("it does not train")

    def dense(self, codes: Any) -> torch.Tensor:
        """Codes as a matrix [B, F]."""
        matrix: torch.Tensor = codes
        return matrix

    @functools.cached_property
    def given(self) -> torch.Tensor:
        """The codes to decode as a matrix [B, F]; made in the first, untimed run."""
        values, indices = self.tensors["values"], self.tensors["indices"]
        codes = values.new_zeros(len(values), len(self.tensors["W_enc"]))
        return codes.scatter_(1, indices, values)

    def parts(self) -> Tensors:
        """The present weights, or views of them, by the names and shapes of ``tensors``.

        Default: the given weights.
        """
        return {name: self.tensors[name] for name in WEIGHTS}

    def weights(self) -> Tensors:
        """Copies of the present weights in fp32, with the meaning of ``tensors``.

        A library that scales codes by decoder norms folds them in here: the plain formula on these
        weights must give its reconstruction.
        """
        return copies(**self.parts())

    def finished(self) -> Tensors:
        """What the library would save now, as :meth:`weights` has it."""
        return self.weights()

    def encoder(self) -> torch.Tensor:
        """The encoder's parameter."""
        return self.parts()["W_enc"]

    def rows(self, parameter: torch.Tensor) -> torch.Tensor:
        """The parameter, or its gradient, as rows [F, D]."""
        return parameter

    def trained(self) -> torch.Tensor:
        """A copy of the encoder's rows [F, D] as they are trained, nothing folded."""
        return self.rows(self.encoder().detach()).clone()

    def gradient(self) -> torch.Tensor:
        """A copy of the gradient of those rows [F, D] after :meth:`backward`."""
        grad = self.encoder().grad
        assert grad is not None
        return self.rows(grad).clone()

    def loop(self, batches: Iterator[torch.Tensor]) -> None:
        """Runs the task once for each batch."""
        if self.task.mode == "step":
            return self.train(batches)
        with torch.set_grad_enabled(self.task.mode != "inference"):
            if self.task.mode != "inference":
                for x in batches:
                    with self.task.autocast():
                        self.once(x)
            else:  # weights that nobody trains are cast once for all batches, as ours are stored
                with self.task.autocast():
                    for x in batches:
                        self.once(x)

    def once(self, x: torch.Tensor) -> None:
        """Runs one encoding, decoding, forward, or forward and backward pass."""
        if self.task.operation == "encode":
            self.encode(x)
        elif self.task.operation == "decode":
            self.decode()
        elif self.task.mode != "backward":
            self.forward(x)
        else:
            self.backward(x)

    def backward(self, x: torch.Tensor) -> None:
        """Computes the gradients of the squared error per token into ``.grad``."""
        for parameter in self.parameters():
            parameter.grad = None
        error = self.forward(x).float() - x
        (error.square().sum() / x.shape[0]).backward()


def copies(**tensors: torch.Tensor) -> Tensors:
    """Detached copies of tensors in fp32."""
    return {name: tensor.detach().float().clone() for name, tensor in tensors.items()}


def fill(parameters: Tensors, tensors: Tensors) -> None:
    """Copies weights into a library's parameters, or views of them, of the same shapes."""
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[name])


class Unable(Exception):
    """Raised for a task that a library cannot do here; the message says why."""
