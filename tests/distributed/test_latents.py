"""Latents over ranks: the same kept entries as one process, and the same training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels.bench.plan import Layout, Problem
from sae_kernels.distributed.batches import GatheredBatches
from sae_kernels.distributed.collectives import Collectives
from sae_kernels.distributed.latents import LatentRanks
from sae_kernels.primitives.auxk import auxk
from sae_kernels.step import fused_step
from tests.distributed.problems import batch_winners, joined, kept_sets, stepper, trained
from tests.distributed.world import on_ranks
from tests.threads import one_thread

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed import ProcessGroup

CLIPPED = {"compute": "float32", "clip_norm": 0.05}
TRANSCODER = {"skip": True, "d_out": 12, "subtract_b_dec": False}
SWITCH = {"k": 6, "n_latents": 96, "n_experts": 12}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"optimizer": CLIPPED},
    "auxk": {
        "objective": {"dead_after_tokens": 150, "auxk_latents": 16},
        "optimizer": CLIPPED,
    },
    "auxk_bf16": {
        "objective": {"dead_after_tokens": 150, "auxk_latents": 16},
        "optimizer": {"compute": "bfloat16"},
    },
    "lazy": {"optimizer": {"compute": "float32", "adam": "lazy"}},
    "bf16": {"optimizer": {"compute": "bfloat16", "master_weights": "split"}},
    "by_norm": {"config": {"rank_by_decoder_norm": True, "unit_norm_decoder": False}},
    "negative": {"config": {"relu": "none"}},
    "k_above_a_share": {"config": {"n_latents": 13}},
    "matryoshka": {"config": {"groups": (10, 20, 69)}},
    "random_prefixes": {"objective": {"random_prefixes": 4}},
    "skip": {"config": TRANSCODER},
    "multi": {"objective": {"multi_topk": True}},
    "by_magnitude": {"config": {"relu": "none", "by_magnitude": True}},
    "multi_by_norm": {"config": {"rank_by_decoder_norm": True}, "objective": {"multi_topk": True}},
    "batch": {"kind": "batchtopk", "optimizer": CLIPPED},
    "batch_by_norm": {
        "kind": "batchtopk",
        "config": {"k": 5.5, "rank_by_decoder_norm": True, "groups": (10, 20, 69)},
    },
    "jumprelu": {"kind": "jumprelu", "objective": {"target_l0": 6.0}},
    "jumprelu_revived": {
        "kind": "jumprelu",
        "objective": {"preact_coefficient": 0.1, "dead_after_tokens": 150, "sparsity": "tanh"},
    },
    "relu": {"kind": "relu", "objective": {"sparsity_norm_weighted": True}},
    "gated": {"kind": "gated"},
    "switch": {"kind": "switch", "config": SWITCH, "optimizer": CLIPPED},
    "switch_auxk": {
        "kind": "switch",
        "config": {**SWITCH, "gate": "heaviside"},
        "objective": {"dead_after_tokens": 150, "auxk_alpha": 0.1, "loss": "mse"},
    },
}
SIZES = [3, *(pytest.param(size, marks=pytest.mark.full) for size in (1, 2, 4))]
LR = 1e-3


def problem(name: str) -> dict[str, Any]:
    changed, kind = CASES[name], CASES[name].get("kind", "topk")
    config = {"d_in": 16, "n_latents": 99}
    if kind in ("topk", "batchtopk"):
        config["k"] = 6
    return {
        "kind": kind,
        "config": config | changed.get("config", {}),
        "objective": changed.get("objective", {}),
        "optimizer": changed.get("optimizer", {"compute": "float32"}),
    }


def all_trained(
    group: ProcessGroup, names: Sequence[str], steps: int, over: int = 1
) -> dict[str, Any]:
    return {name: trained(group, problem(name), steps, tokens_over=over) for name in names}


def check_together(
    found: list[dict[str, Any]], one: dict[str, Any], steps: int, rounding: float = 1e-3
) -> None:
    """Ranks have the same figures, and those and the weights of one process within rounding."""
    assert all(each["lines"] == found[0]["lines"] for each in found)
    lines, expected = torch.tensor(found[0]["lines"]), torch.tensor(one["lines"])
    torch.testing.assert_close(lines, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(lines[:, 2], expected[:, 2]), "an entry more or less was kept"
    weights = joined([each["weights"] for each in found], one["weights"])
    state = joined([each["state"] for each in found], one["state"])
    assert torch.equal(state["dead.since_fired"], one["state"]["dead.since_fired"])
    for name, weight in weights.items():
        # A step moves a weight by up to LR: a wrong gradient would show in that order.
        away = float((weight - one["weights"][name]).abs().max())
        assert away < rounding * steps * LR, f"{name} is {away} away"


@pytest.mark.parametrize("size", SIZES)
def test_the_kept_set_is_that_of_one_process(size: int) -> None:
    for differing in on_ranks(size, kept_sets, 20, 60):
        assert not differing, "\n".join(differing)


@pytest.mark.parametrize("size", SIZES)
def test_a_batch_keeps_what_one_process_would(size: int) -> None:
    for differing in on_ranks(size, batch_winners, 20):
        assert not differing, "\n".join(differing)


@pytest.mark.full
@pytest.mark.parametrize("size", [2, 4])
def test_the_kept_set_of_very_many_tokens(size: int) -> None:
    assert on_ranks(size, kept_sets, 10, 10_000) == [[]] * size


def exchanged(group: ProcessGroup) -> list[list[torch.Tensor]]:
    """What comes of each exchange, by messages from rank to rank and by the group's collectives."""
    results = []
    for directly in (True, False):
        ranks = Collectives(group)
        ranks._sends_directly = directly
        x = torch.randn(7, 3, generator=torch.Generator().manual_seed(ranks.rank))
        own = x[: len(range(7)[ranks.share(7)])]
        found = [ranks.gather(x, "x"), ranks.gather_rows(own, 7, "x"), ranks.gather(x[:0], "x")]
        found += [*ranks.to_owners(x, "x"), *ranks.exchange(x[: ranks.size].int(), "x")]
        found += [ranks.sum_to_owners(x.clone(), "x"), torch.tensor(ranks.sent["x"])]
        results.append([*found, ranks.sum_to_owners(x, "x", torch.bfloat16)])
    return results


@pytest.mark.full
@pytest.mark.parametrize("size", [2, 3])
def test_messages_and_collectives_agree(size: int) -> None:
    """NCCL gathers and exchanges by its own collectives, gloo by messages."""
    for one, other in on_ranks(size, exchanged):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("size", SIZES)
def test_training_is_that_of_one_process(size: int) -> None:
    check_training(size, list(CASES))


def check_training(size: int, names: list[str], over: int = 1) -> None:
    """A few steps of each case on so many ranks, the tokens over some, and in one process."""
    steps = 6
    found = on_ranks(size, all_trained, names, steps, over)
    for name in names:
        one = trained(None, problem(name), steps, spread=False)
        # torch's bf16 products, of which AuxK's sums are made, are off by 2^-9 of each part.
        rounding = {"rounding": 2**-8} if name == "auxk_bf16" else {}
        check_together([each[name] for each in found], one, steps, **rounding)
        if name.startswith("auxk"):
            assert one["lines"][-1][3] > 0, "no latent was dead"


def auxk_tokens(group: ProcessGroup, blocks: int) -> list[int]:
    """The tokens that each call of AuxK has."""
    seen: list[int] = []

    def counted(x: torch.Tensor, *args: Any, **options: Any) -> Any:
        seen.append(len(x))
        return auxk(x, *args, **options)

    fused_step.auxk = counted  # type: ignore[assignment]
    wanted = {**problem("auxk"), "config": {"d_in": 16, "n_latents": 96, "k": 6}}
    trained(group, wanted, 4, 50, blocks=blocks)
    return seen


@pytest.mark.full
def test_each_rank_computes_a_share_of_auxk() -> None:
    """Of 50 tokens, once a latent is dead; with blocks each of them by itself."""
    for blocks, calls in ((0, 1), (6, 2)):
        found = on_ranks(3, auxk_tokens, blocks)
        steps = len(found[0]) // calls
        assert steps > 0
        assert sum(map(sum, found)) == 50 * steps
        for each in found:
            assert len(each) == calls * steps
            assert max(each) <= -(-50 // (3 * calls))


@pytest.mark.full
@pytest.mark.parametrize("size", [2, 4])
def test_training_stays_that_of_one_process(size: int) -> None:
    steps = 100
    one = trained(None, problem("auxk"), steps, spread=False)
    found = on_ranks(size, trained, problem("auxk"), steps)
    check_together(found, one, steps)


def blocks_trained(
    group: ProcessGroup | None, names: Sequence[str], blocks: int, over: int = 1
) -> dict[str, Any]:
    layout = {"blocks": blocks, "tokens_over": over}
    return {name: trained(group, blocky(name), 6, **layout) for name in names}


def blocky(name: str) -> dict[str, Any]:
    """A problem whose latents blocks divide."""
    wanted = problem(name)
    return {**wanted, "config": wanted["config"] | {"n_latents": 96}}


@pytest.mark.parametrize("size", SIZES)
def test_blocks_give_the_same_bits_on_any_ranks(size: int) -> None:
    """On those of which each has a power of two of the blocks."""
    names, blocks = ["auxk", "by_norm", "multi", "batch", "switch"], 4 * size
    with one_thread():
        one = blocks_trained(None, names, blocks)
    found = on_ranks(size, blocks_trained, names, blocks)
    check_same_bits(found, one)


def check_same_bits(found: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """The trainings of ranks, by name, have the figures and weights of one process."""
    for name, alone in one.items():
        each = [results[name] for results in found]
        assert each[0]["lines"] == alone["lines"], name
        for kind in ("weights", "state"):
            whole = joined([part[kind] for part in each], alone[kind])
            for what, tensor in whole.items():
                assert torch.equal(tensor, alone[kind][what]), f"{name}: {what}"


def test_blocks_divide_the_latents() -> None:
    with pytest.raises(ValueError, match="blocks: expected a divisor of n_latents = 99, got 8"):
        LatentRanks(None, 99, blocks=8)


def halved(group: ProcessGroup, names: Sequence[str]) -> dict[str, Any]:
    options = {"partial_sums": "bfloat16"}
    return {name: trained(group, problem(name), 1, **options) for name in names}


@pytest.mark.full
@pytest.mark.parametrize("size", [2, 4])
def test_partial_sums_in_half_the_bytes(size: int) -> None:
    """Each part is off by 2^-9 of itself at most, so a residual of their sum by little more."""
    for found in on_ranks(size, halved, ["plain", "matryoshka"]):
        one = trained(None, problem("plain"), 1, spread=False)
        off = abs(found["plain"]["lines"][0][1] - one["lines"][0][1])
        assert 0 < off < 2**-8, off
        sent = found["plain"]["sent"]
        assert 2 * sent["partial sums"] == sent["residuals"]


def volume(
    group: ProcessGroup, n_tokens: int, width: int, n_latents: int, over: int = 1
) -> dict[str, dict[str, int]]:
    """Bytes that a rank sends in a step, and those that it holds, by name."""
    wanted = problem("plain")
    wanted = {**wanted, "config": wanted["config"] | {"d_in": width, "n_latents": n_latents}}
    result = trained(group, wanted, 1, n_tokens, tokens_over=over)
    held = {**result["weights"], **result["state"]}
    ranks, own = Collectives(group), torch.zeros(n_tokens // group.size(), width)
    next(GatheredBatches(iter([own]), n_tokens, ranks))  # type: ignore[arg-type]
    sent = {**result["sent"], **ranks.sent}
    return {"sent": sent, "held": {name: tensor.nbytes for name, tensor in held.items()}}


@pytest.mark.full
@pytest.mark.parametrize(("size", "over"), [(2, 1), (4, 1), (2, 2), (4, 4), (4, 2)])
def test_what_a_rank_sends(size: int, over: int) -> None:
    """What the planner says; and sums of the size of b_dec, ages of dead latents."""
    B, D, K, F = 96, 64, 6, 100
    plan, planned = Problem(D, F, K, B, "float32"), Layout(size // over, over)
    message = {m.what: m.bytes for m in planned.messages(plan)}
    for found in on_ranks(size, volume, B, D, F, over):
        sent = found["sent"]
        assert sent.pop("sums") <= (size - 1) * (4 * D + 8)
        assert sent.pop("ages") == (size - 1) * 8 * -(-F // size)
        assert sent["activations"] == message["tokens"]
        for what in ("partial sums", "residuals", "decoder rows"):
            assert sent.get(what, 0) == message.get(what, 0), what
        assert sum(sent.values()) == pytest.approx(sum(message.values()), rel=0.02)
        if over == 1:
            assert sum(message.values()) == (size - 1) / size * B * (D * (4 + 8) + 4 * K + 8)


@pytest.mark.full
@pytest.mark.parametrize("size", [2, 4])
def test_what_a_rank_holds(size: int) -> None:
    """Weights, moments and counters of its latents, and b_dec: what the planner says."""
    D, F = 64, 100
    plan = Problem(D, F, 6, 96, "float32")
    for found in on_ranks(size, volume, 96, D, F):
        held = sum(found["held"].values())
        assert held == pytest.approx(Layout(size, 1).memory(plan)["weights and states"], rel=0.03)


def all_to_one_expert(group: ProcessGroup | None) -> list[list[float]]:
    """The figures of two steps on tokens that are alike."""
    ranks = None if group is None else LatentRanks(group, 96)
    step = stepper(**problem("switch"), ranks=ranks)
    x = torch.randn(1, 16, generator=torch.Generator().manual_seed(5)).expand(40, 16)
    x = x + torch.arange(40.0)[:, None] * 1e-3
    results = [step(x, lr=LR) for _ in range(2)]
    assert sum(rows.any() for rows in results[0].fired.view(-1, 8)) <= 1
    return [[float(r.loss), float(r.l0), float(step.sae.W_router.detach().sum())] for r in results]


@pytest.mark.full
def test_a_rank_without_tokens() -> None:
    one = all_to_one_expert(None)
    for found in on_ranks(2, all_to_one_expert):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(one), rtol=1e-5, atol=1e-6)


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("topk", {"n_latents": 5}, {}, "n_latents: expected latents for each of 4 ranks, got 5"),
    ("relu", {}, {"sparsity": "lp"}, "sparsity: expected another than 'lp'"),
    ("relu", {}, {"fix_shrinkage": True}, "fix_shrinkage: expected false"),
    ("switch", {"n_experts": 2}, {}, "n_experts: expected whole experts on each rank, got 2"),
    ("switch", {"shared_expert": True}, {}, "shared_expert: expected false with latents over"),
    ("cross_layer_topk", {}, {}, "latents over ranks: expected an architecture"),
]


def refusals(group: ProcessGroup) -> list[str]:
    messages = []
    for kind, changed, objective, _ in REFUSED:
        config = {"d_in": 16, "n_latents": 512, **changed}
        wanted = {"kind": kind, "config": config, "objective": objective, "optimizer": {}}
        try:
            trained(group, wanted, 1)
            messages.append("trained")
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_what_cannot_be_spread_is_refused() -> None:
    for messages in on_ranks(4, refusals):
        for message, (*_, words) in zip(messages, REFUSED, strict=True):
            assert words in message
