"""A model's stream on ranks, as the functions that each of them carries out."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from torch.distributed.device_mesh import DeviceMesh

from sae_kernels.distributed.team import Team
from sae_kernels.harvest import LiveBatches
from tests.distributed.world import TIMEOUT
from tests.harvest.causal import CONTEXT, LAYER, documents, gpt2, sinking, tokenizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def stream(sinks: bool = False, text: Any = None, **options: Any) -> LiveBatches:
    """Of a tiny model, some of whose activations are enormous if ``sinks``."""
    model = sinking() if sinks else gpt2()
    given = {"batch_size": 25, "window_rows": 60, "model_batch_size": 2, **options}
    text = documents(40) if text is None else text
    return LiveBatches(model, tokenizer(), text, LAYER, context_length=CONTEXT, **given)


def given(
    group: ProcessGroup | None,
    n: int,
    start: dict[str, Any] | None = None,
    sample: int = 30,
    **options: Any,
) -> dict[str, Any]:
    """Batches of a stream with the state after each, a sample before them, and what it cost."""
    batches, ran, most, states = stream(**options), [0], 0, []
    team = None if group is None else Team(DeviceMesh.from_group(group, "cpu"), TIMEOUT)

    def count(_module: Any, _args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        ran[0] += first.shape[:2].numel()

    batches._read[0].transformer.h[1].register_forward_hook(count)
    with nullcontext() if team is None else batches.spread_over(team):
        found = {"sample": batches.sample(sample)} if sample else {}
        if start is not None:
            batches.load_state_dict(start)
        rows = []
        for _ in range(n):
            rows.append(next(batches))
            states.append(json.loads(json.dumps(batches.state_dict())))
            most = max(most, len(batches._window.own))
    sent = 0 if team is None else team.collectives.sent["activations"]
    return {**found, "rows": rows, "states": states, "most": most, "ran": ran[0], "sent": sent}


def refusals(group: ProcessGroup) -> list[str]:
    """The error of each rank where the last has another text, and where its model gives NaN."""
    return [refused(group, fault) for fault in ("text", "nan")]


def refused(group: ProcessGroup, fault: str) -> str:
    last = group.rank() == group.size() - 1
    batches = stream(text=documents(39 if last and fault == "text" else 40))
    if last and fault == "nan":
        batches._read[0].transformer.h[1].mlp.c_proj.bias.data[3] = float("nan")
    try:
        with batches.spread_over(Team(DeviceMesh.from_group(group, "cpu"), TIMEOUT)):
            for _ in range(40):
                next(batches)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
