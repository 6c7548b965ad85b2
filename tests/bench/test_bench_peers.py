"""The peers' own loops, in their environments, against the plain formulas in fp64."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import peer_probe
import pytest
import torch

import sae_kernels.bench
from sae_kernels.bench import environments
from sae_kernels.bench.cases import Case, Shape, step
from sae_kernels.bench.providers import GROUPS
from sae_kernels.bench.run import BenchRun, BenchSettings
from sae_kernels.testing.budgets import assert_within, rounding

B, D, F, K = 64, 32, 128, 4
FP32 = torch.float32
# The step whose direction counts: the first of the others sets up biases or has no learning rate.
STEPS = {"sparsify": 2, "dictionary_learning": 2, "sae_lens": 1}
HAS = {
    "sparsify": {"topk"},
    "dictionary_learning": {"topk", "batch_topk"},
    "sae_lens": {"topk", "batch_topk"},
}


def problem() -> dict[str, torch.Tensor]:
    """Random tokens, weights and codes; decoder rows of norm 1, as all peers keep or mean them."""
    draw = torch.Generator().manual_seed(6)
    tensors = {
        "x": torch.randn(B, D, generator=draw) + 0.5,
        "W_enc": torch.randn(F, D, generator=draw) / D**0.5,
        "b_enc": 0.1 * torch.randn(F, generator=draw),
        "W_dec": torch.nn.functional.normalize(torch.randn(F, D, generator=draw), dim=1),
        "b_dec": 0.1 * torch.randn(D, generator=draw),
        "values": torch.rand(B, K, generator=draw) + 0.5,
    }
    chosen = torch.rand(B, F, generator=draw).topk(K, dim=1)
    return tensors | {"indices": chosen.indices}


@pytest.fixture(scope="module", params=list(environments.PEERS))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The name of a peer and what its probe found; one process for all tests."""
    name = request.param
    python = environments.python_of(name)
    if python is None:
        pytest.skip(f"{name} is not installed: sae-kernels bench --setup-peers {name}")
    folder, work = tmp_path_factory.mktemp(name), tmp_path_factory.mktemp(f"{name}_work")
    inputs, out = folder / "in.pt", folder / "out.pt"
    torch.save(problem(), inputs)
    script = str(Path(peer_probe.__file__).resolve())
    bench = str(Path(sae_kernels.bench.__path__[0]).resolve())
    done = subprocess.run(
        [str(python), script, name, str(inputs), str(out), str(STEPS[name])],
        env=os.environ | {"PYTHONPATH": bench},
        cwd=work,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert not list(work.iterdir()), "a training run left files behind"
    return name, torch.load(out, weights_only=True)


def cells(run: Any, dtype: str) -> list[tuple[str, dict[str, Any]]]:
    """What was found of the architectures that the peer has."""
    name, found = run
    return [(a, found[f"{a} {dtype}"]) for a in peer_probe.ARCHITECTURES if a in HAS[name]]


class Exact(NamedTuple):
    """A forward pass in fp64, and how far one in fp32 may be from it."""

    codes: torch.Tensor
    codes_budget: torch.Tensor
    x_hat: torch.Tensor
    x_hat_budget: torch.Tensor
    gradient: torch.Tensor
    gradient_budget: torch.Tensor


def exact(architecture: str, weights: dict[str, torch.Tensor], *, certain: bool = True) -> Exact:
    """Of the problem's tokens, by the plain formulas.

    Sums are of D terms (scores, code gradients), F (reconstructions) and B (weight gradients). The
    norm of a decoder row, by which SAELens scales, is another sum of D; a few operations remain.
    """
    x = problem()["x"].double()
    W_enc, b_enc, W_dec, b_dec = (
        weights[name].double() for name in ("W_enc", "b_enc", "W_dec", "b_dec")
    )
    centred = x - b_dec
    scores = centred @ W_enc.T + b_enc
    sizes = x.abs() + b_dec.abs()
    budget = rounding(2 * D + 8, sizes @ W_enc.abs().T + b_enc.abs(), FP32)
    kept = selected(architecture, scores, budget if certain else None)
    codes, codes_budget = scores * kept, budget * kept
    x_hat = codes @ W_dec + b_dec
    large = codes.abs() @ W_dec.abs() + b_dec.abs()
    x_hat_budget = codes_budget @ W_dec.abs() + rounding(F + 2 * D + 8, large, FP32)
    error = x_hat - x
    gradient = ((error @ W_dec.T) * kept).T @ centred * (2 / B)
    error_large = x.abs() + large
    largest = ((error_large @ W_dec.abs().T) * kept).T @ sizes * (2 / B)
    moved = ((x_hat_budget @ W_dec.abs().T) * kept).T @ sizes * (2 / B)
    return Exact(
        codes,
        codes_budget,
        x_hat,
        x_hat_budget,
        gradient,
        moved + rounding(B + F + 4 * D + 16, largest, FP32),
    )


def selected(architecture: str, scores: torch.Tensor, budget: torch.Tensor | None) -> torch.Tensor:
    """Which entries are kept: given a budget, no other entry may be within it of being so."""
    shape, k = ((B, F), K) if architecture == "topk" else ((1, B * F), K * B)
    rows = scores.view(shape)
    top = rows.topk(k + 1, dim=1)
    if budget is not None:
        last, runner_up = top.values[:, k - 1], top.values[:, k]
        doubt = budget.view(shape).gather(1, top.indices[:, k - 1 :]).sum(1)
        assert bool((last - runner_up.clamp(min=0) > doubt).all()), "a near tie: take another seed"
    kept = torch.zeros_like(rows).scatter_(1, top.indices[:, :k], 1.0)
    return kept.view_as(scores)


def test_it_computes_the_plain_formula(run: Any) -> None:
    for architecture, found in cells(run, "float32"):
        want = exact(architecture, found["weights"])
        assert_within("codes", found["codes"], want.codes, want.codes_budget)
        assert_within("x_hat", found["x_hat"], want.x_hat, want.x_hat_budget)
        assert_within("gradient", found["gradient"], want.gradient, want.gradient_budget)


def test_it_starts_from_the_given_weights(run: Any) -> None:
    given = problem()
    for _, found in cells(run, "float32"):
        for name, weight in found["weights"].items():
            # Rows are divided by norms that are 1 but for the rounding of D terms.
            budget = rounding(2 * D + 8, given[name].double().abs(), FP32)
            assert_within(name, weight, given[name], 2 * budget)


def test_it_decodes_the_given_codes(run: Any) -> None:
    given = problem()
    rows = given["W_dec"].double()[given["indices"]]
    values, b_dec = given["values"].double()[..., None], given["b_dec"].double()
    large = (values * rows.abs()).sum(1) + b_dec.abs()
    for _, found in cells(run, "float32"):
        budget = rounding(F + 2 * D + 8, large, FP32)
        assert_within("decoded", found["decoded"], (values * rows).sum(1) + b_dec, budget)


def test_a_step_goes_against_the_gradient(run: Any) -> None:
    for architecture, found in cells(run, "float32"):
        want = exact(architecture, found["start"])
        clear = want.gradient.abs() > want.gradient_budget
        assert float(clear.double().mean()) > 0.5, "the test would see too little"
        against = found["moved"].double().sign() == -want.gradient.sign()
        assert bool(against[clear].all()), f"{int((~against[clear]).sum())} of {int(clear.sum())}"


def test_a_step_in_bf16_goes_downhill(run: Any) -> None:
    for architecture, found in cells(run, "bfloat16"):
        want = exact(architecture, found["start"], certain=False)
        assert float((found["moved"].double() * want.gradient).sum()) < 0
        assert int((found["codes"] != 0).sum()) == B * K
        fp32 = run[1][f"{architecture} float32"]["codes"]
        assert not torch.equal(found["codes"], fp32), "no bf16 in it"


def test_an_exception_of_the_iterator_ends_the_loop(run: Any) -> None:
    name, _ = run
    for dtype in peer_probe.DTYPES:
        for _, found in cells(run, dtype):
            assert found["asked"] == STEPS[name] + 1


def test_what_it_has_not_is_said(run: Any) -> None:
    name, found = run
    for architecture in set(peer_probe.ARCHITECTURES) - HAS[name]:
        answer = found[f"{architecture} float32"]
        assert isinstance(answer, str)
        assert architecture in answer
        assert environments.PEERS[name].partition("==")[0] in answer


def test_the_harness_lets_it_through_its_gate(run: Any) -> None:
    """Alone and accelerated, and accelerated with every step on the kernels."""
    name, _ = run
    who = GROUPS[f"{name}+ours"]
    assert len(who) == 6
    with BenchRun(who, BenchSettings(threads=2, rounds=3)) as bench:
        records = bench.records([step(Shape(B, D, F, K), "zipf")])
        found = {(r["provider"], r["dtype"]): r for r in records}
        said = bench.libraries
    for provider in who:
        record = found[provider.name, provider.dtype]
        if provider.dtype == "bfloat16" and "times as long" in (record["reason"] or ""):
            assert not provider.accelerated
            continue  # the CPU has no bf16 units
        assert (record["status"], record["reason"]) == ("measured", None)
        assert said[provider.key]["package"] == environments.PEERS[name].replace("==", " ")
        assert ("speedup_of_library" in record) == provider.accelerated
        if provider.accelerated:
            assert f"level {provider.options['accelerate']}" in said[provider.key]["differs"]
            calls = record["calls"]
            assert min(calls["taken"].values()) >= record["rounds"]
            # Zeros among the k largest are sparsify's own; they come up as its weights drift.
            short = {"encode (tokens with fewer than k positive pre-activations, alone)"}
            assert set(calls["left"]) <= (short if name == "sparsify" else set())
            assert not calls["dense"]  # the gate's reads came before
            alone = found[name, provider.dtype]
            ratio = alone["median_ms"] / record["median_ms"]
            assert record["speedup_of_library"] == pytest.approx(ratio, rel=1e-3)


@pytest.mark.parametrize("run", ["sae_lens"], indirect=True)
def test_what_was_left_as_shipped_is_counted(run: Any) -> None:
    """Decoding a dense tensor of codes."""
    name, _ = run
    case = Case("decode", "inference", Shape(B, D, F, K), "zipf")
    (who,) = (p for p in GROUPS[f"{name}+ours"] if p.key == f"{name}+ours:module float32")
    with BenchRun([who], BenchSettings(threads=2, rounds=3)) as bench:
        (record,) = bench.records([case])
    assert record["status"] == "measured"
    assert record["speedup_of_library"] is None  # it did not run alone
    assert not record["calls"]["taken"]
