"""FusedStep as the GPU runs it: no waiting, graphs, streams, devices, memory, repeatability."""

from __future__ import annotations

import gpu_steps
import pytest
import torch
from gpu_steps import assert_same, assert_trained, batches, build, state

from sae_kernels.training.graphed_step import STEADY, GraphedStep, eager_reason

PRIMITIVES = ("FusedStep",)
variants = pytest.mark.parametrize("variant", gpu_steps.VARIANTS)


@variants
def test_a_step_never_waits_for_the_host(variant: str, device: torch.device) -> None:
    step, (x,) = build(variant, device), batches(1, device)
    lr = torch.tensor(1e-3, device=device)
    step(x, lr=lr)  # the first call compiles and loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x, lr=lr)
        step(x, lr=1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_trained(step)


def test_waiting_would_be_noticed(device: torch.device) -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device=device).item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "variant", [name for name in gpu_steps.VARIANTS if name != "random-prefixes"]
)
def test_replaying_a_graph_is_stepping(variant: str, device: torch.device) -> None:
    # Prefixes that the host draws anew for each step are not in a graph.
    eager, captured = build(variant, device), build(variant, device)
    first, *rest = batches(4, device)
    lr = torch.tensor(1e-3, device=device)
    for x in (first, *rest):
        eager_result = eager(x, lr=lr)
    x = first.clone()
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        captured(x, lr=lr)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = captured(x, lr=lr)
    for batch in rest:
        x.copy_(batch)
        graph.replay()
    assert_trained(eager)
    assert_same(state(captured), state(eager))
    assert_same(result._asdict(), eager_result._asdict())


@pytest.mark.parametrize("variant", gpu_steps.VARIANTS)
def test_a_graphed_step_is_a_step(variant: str, device: torch.device) -> None:
    eager, own = build(variant, device), build(variant, device)
    reason = eager_reason(own)
    assert (reason is None) == (variant != "random-prefixes")
    if reason is not None:
        return
    graphed = GraphedStep(own)
    for i, x in enumerate(batches(STEADY + 4, device)):
        expected, result = (step(x, lr=1e-3 * (i + 1)) for step in (eager, graphed))
        assert_same(result._asdict(), expected._asdict())
    assert graphed.reason is None
    assert_same(state(own), state(eager))


@variants
def test_a_step_runs_on_the_current_stream(variant: str, device: torch.device) -> None:
    # The tokens arrive late on the side stream: a kernel on any other would read the zeros.
    expected, step, (x,) = build(variant, device), build(variant, device), batches(1, device)
    expected(x, lr=1e-3)
    step(x, lr=1e-3)
    expected(x + 1, lr=1e-3)
    late = torch.zeros_like(x)
    torch.cuda.synchronize(device)
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # cycles: about a tenth of a second
        late.copy_(x + 1)
        step(late, lr=1e-3)
    side.synchronize()
    assert_same(state(step), state(expected))


def test_a_step_runs_on_the_device_of_its_tensors(device: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda", 1)
    if torch.cuda.get_device_name(device) != torch.cuda.get_device_name(other):
        pytest.skip("needs two GPUs of one kind: others may round differently")
    steps = build("bf16", device), build("bf16", other)
    for step, where in zip(steps, (device, other), strict=True):
        for x in batches(2, where):  # the current device stays the first
            step(x, lr=1e-3)
    assert_same(state(steps[1]), state(steps[0]))


@variants
def test_twenty_repeats_end_in_the_same_bits(variant: str, device: torch.device) -> None:
    ends = []
    for _ in range(20):
        step = build(variant, device)
        for x in batches(3, device):
            result = step(x, lr=1e-3)
        ends.append(state(step) | result._asdict())
    assert_trained(step)
    for end in ends[1:]:
        assert_same(end, ends[0])


def test_dead_latents_learn_and_no_others_gain(device: torch.device) -> None:
    with_auxk, without = build("auxk", device), build("bf16", device)
    (x,) = batches(1, device)
    assert float(with_auxk(x, lr=1e-3).aux_loss) > 0
    assert float(without(x, lr=1e-3).aux_loss) == 0
    changed = (with_auxk.matrices["W_enc"].m != without.matrices["W_enc"].m).any(dim=1)
    dead = with_auxk.dead
    assert int(changed.sum()) == with_auxk.config.auxk_latents  # all places were taken
    assert int(changed.nonzero().max()) < gpu_steps.DEAD
    assert dead.since_fired.shape == (gpu_steps.F,)


def test_a_loss_that_is_not_finite_changes_nothing(device: torch.device) -> None:
    step, (x, bad) = build("bf16", device), batches(2, device)
    step(x, lr=1e-3)
    before = state(step)
    bad[3, 5] = torch.nan
    assert bool(step(bad, lr=1e-3).skipped)
    assert_same(state(step), before)


def test_a_step_has_no_memory_that_grows_with_tokens_times_latents(device: torch.device) -> None:
    # Four times the latents: scores in bf16 would grow by 1.5 GiB, one gradient in fp32 by 192 MiB.
    from sae_kernels.config import OptimizerConfig
    from sae_kernels.nn import TopKObjective, TopKSAE
    from sae_kernels.step import FusedStep

    taken = []
    x = torch.randn(8192, 256, device=device)
    for n_latents in (1 << 15, 1 << 17):
        sae = TopKSAE(256, n_latents, k=32, device=device)
        step = FusedStep(sae, TopKObjective(auxk_alpha=0.0), OptimizerConfig(compute="bfloat16"))
        step(x, lr=1e-3)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step(x, lr=1e-3)
        taken.append(torch.cuda.max_memory_allocated(device) - before)
        del step
    assert taken[1] - taken[0] < 32 << 20, f"{taken[0]} bytes, then {taken[1]}"
