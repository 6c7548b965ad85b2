"""The emulator finds what is wrong: faults planted into the kernels' own PTX, one a test."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from emulator import cuda_kernels, triton_driver
from emulator.triton_driver import replacing
from sae_kernels.primitives.candidate_lists import CandidateLists
from sae_kernels.primitives.select_threshold import triton as select_threshold
from sae_kernels.primitives.select_topk import gluon, select_topk, triton
from sae_kernels.primitives.select_topk.column_passes import ColumnPass, EncoderOperands
from sae_kernels.primitives.transpose_codes import transpose_codes

pytestmark = pytest.mark.full
B, D, F, CAPACITY = 40, 512, 600, 256
THRESHOLD = 30.0
Fault = tuple[str, tuple[tuple[str, str], ...], str]


def encode(kernels: Any, architecture: int, *replacements: tuple[str, str]) -> CandidateLists:
    """One pass over all columns: products of tiles, and what is above a threshold in lists."""
    torch.manual_seed(0)
    x, W, b = torch.randn(B, D).bfloat16(), torch.randn(F, D).bfloat16(), torch.randn(F)
    lists = CandidateLists(
        torch.zeros(128, dtype=torch.int32),
        torch.full((128,), THRESHOLD),
        torch.zeros(128, CAPACITY, dtype=torch.int64),
    )
    edit = replacing("_encode_pass", *replacements) if replacements else None
    with triton_driver.emulated(architecture, edit):
        tile = kernels.tile_for(x, W)
        columns = ColumnPass(torch.ones(1, dtype=torch.int32), 0, -(-F // tile.columns), 1)
        kernels.encode_pass(EncoderOperands(x, W, b, None), lists, columns, tile)
    scores = x.float() @ W.float().T + b
    assert lists.counts[:B].equal((scores >= THRESHOLD).sum(1).int()), "wrong counts"
    for row in range(B):
        latents = (lists.candidates[row, : lists.counts[row]] >> 32).sort().values
        assert latents.equal((scores[row] >= THRESHOLD).nonzero().flatten()), "wrong latents"
    return lists


def ids(fault: Fault) -> str:
    return fault[0].replace(" ", "-")


def check(kernels: Any, architecture: int, fault: Fault) -> None:
    """The fault ends the launch with such words, or changes the result."""
    _, replacements, words = fault
    with pytest.raises((RuntimeError, AssertionError), match=words):
        encode(kernels, architecture, *replacements)


@pytest.mark.parametrize(
    ("kernels", "architecture"), [(triton, 80), (triton, 90), (gluon, 90)], ids=str
)
def test_without_a_fault_nothing_is_found(kernels: Any, architecture: int) -> None:
    encode(kernels, architecture)


WAIT = r"cp\.async\.wait_group (\s*)"
COPY = r"cp\.async\.cg\.shared\.global (\[[^]]*\]), \[ (%rd\d+) \+ 0 \]"
COMMIT = r"cp\.async\.commit_group;"
BARRIER = r"bar\.sync \s*0;"
AMPERE: list[Fault] = [
    ("wait count raised", ((WAIT + "2;", r"cp.async.wait_group \g<1>4;"),), "being copied"),
    ("no wait", ((WAIT + "2;", ""),), "being copied"),
    ("groups not committed", ((f"({WAIT}2;.*?){COMMIT}(.*?){COMMIT}", r"\1\3"),), "being copied"),
    ("no barrier after the wait", ((f"({WAIT}2;.*?){BARRIER}", r"\1"),), "race in shared memory"),
    (
        "slot taken twice",
        ((f"({WAIT}2;.*?{BARRIER}.*?){BARRIER}", r"\1"),),
        "race in shared memory: writes",
    ),
    (
        "count without an atomic",
        (
            (
                r"@passes atom\.global\.relaxed\.gpu\.add\.u32 (%r\d+), (\[%rd\d+\]), 1;",
                r"@passes ld.global.u32 \1, \2; @passes st.global.u32 \2, \1;",
            ),
        ),
        "race in global memory|wrong counts",
    ),
    (
        "copy beyond the tensor",
        ((COPY, r"cp.async.cg.shared.global \1, [\2+3145728]"),),
        "out of bounds",
    ),
    ("misaligned copy", ((COPY, r"cp.async.cg.shared.global \1, [\2+2]"),), "misaligned"),
    ("tile of another place", ((r"(ldmatrix[^;]*\[%r\d+)\+4096\]", r"\1+8192]"),), "wrong"),
    ("a copy left out", ((COPY + "[^;]*;", ""),), "uninitialised|wrong"),
    (
        "entry stored elsewhere",
        ((r"@fits st\.global\.v2\.b32 \[entry\]", "@fits st.global.v2.b32 [entry+8]"),),
        "race in global memory|wrong latents",
    ),
]


@pytest.mark.parametrize("fault", AMPERE, ids=ids)
def test_copies_and_barriers_on_ampere(fault: Fault) -> None:
    check(triton, 80, fault)


EXPECT = r"(mbarrier\.arrive\.expect_tx\.shared\.b64 _, \[%r\d+\]), 49152"
TRY_WAIT = r"mbarrier\.try_wait\.parity\.shared\.b64 complete, \[%r\d+\], %r\d+;"
PRODUCTS = r"wgmma\.wait_group\.sync\.aligned \s*"
HOPPER: list[Fault] = [
    (
        "too many bytes expected",
        ((EXPECT, r"\1, 49168"),),
        r"deadlock(.|\n)*lacks 0 arrivals and 16 bytes",
    ),
    ("too few bytes expected", ((EXPECT, r"\1, 32768"),), "deadlock|being copied"),
    ("mbarrier not waited for", ((TRY_WAIT, "mov.pred complete, -1;"),), "being copied"),
    ("mbarrier counts two", ((r"(mbarrier\.init[^;]*), 1;", r"\1, 2;"),), "deadlock"),
    ("mbarrier never made", ((r"@%p\d+ mbarrier\.init[^;]*;", ""),), "invalid mbarrier"),
    ("product read before it is there", ((PRODUCTS + "0;", ""),), "a product will write"),
    ("no fence before the product", ((r"wgmma\.fence\.sync\.aligned;", ""),), "unfenced"),
    (
        "product not committed",
        ((r"wgmma\.commit_group\.sync\.aligned;", ""),),
        "a product will write",
    ),
    # A descriptor's two upper bits: lines of 64 bytes for those of 128.
    (
        "another swizzle",
        (("4611686293305294848", "-4611685743549480960"),),
        "wrong|uninitialised",
    ),
    (
        "slot taken while it is multiplied",
        ((PRODUCTS + "1;", "wgmma.wait_group.sync.aligned 2;"),),
        "being multiplied",
    ),
]


@pytest.mark.parametrize("fault", HOPPER, ids=ids)
def test_tensor_copies_and_products_on_hopper(fault: Fault) -> None:
    check(triton, 90, fault)


def found_behind_a_screen(architecture: int, *replacements: tuple[str, str]) -> torch.Tensor:
    """The latents of bf16 scores whose bounds, from a product in int8, are above a threshold."""
    torch.manual_seed(0)
    x, W = torch.randn(B, D).bfloat16(), torch.randn(F, D).bfloat16()
    edit = replacing("_find", *replacements) if replacements else None
    with triton_driver.emulated(architecture, edit):
        found = select_threshold.behind_screen(x, W, None, torch.full((F,), 3 * THRESHOLD))
    assert found is not None, "wrong counts"
    return found[1]


def test_products_of_bytes_without_a_fault() -> None:
    first, second = (found_behind_a_screen(architecture) for architecture in (80, 90))
    assert 0 < len(first) < B * F // 32
    assert first.equal(second)


def assert_found_behind_a_screen(architecture: int, *replacements: tuple[str, str]) -> None:
    came = found_behind_a_screen(architecture, *replacements)
    assert came.equal(found_behind_a_screen(architecture)), "wrong latents"


BYTES: list[tuple[int, Fault]] = [
    (80, ("no wait", ((WAIT + r"\d;", ""),), "being copied")),
    (80, ("tile of another place", ((r"(ldmatrix[^;]*\[%r\d+)\+4096\]", r"\1+8192]"),), "wrong")),
    (90, ("product read before it is there", ((PRODUCTS + "0;", ""),), "a product will write")),
    (90, ("no fence", ((r"wgmma\.fence\.sync\.aligned;", ""),), "unfenced")),
]


@pytest.mark.parametrize(("architecture", "fault"), BYTES, ids=lambda f: str(f).split("'")[-1])
def test_products_of_bytes(architecture: int, fault: Fault) -> None:
    _, replacements, words = fault
    with pytest.raises((RuntimeError, AssertionError), match=words):
        assert_found_behind_a_screen(architecture, *replacements)


ARRIVE = r"@%p\d+ mbarrier\.arrive\.shared::cta\.b64[^;]*;"
RING: list[Fault] = [
    (
        "slot filled before it is empty",
        ((f"(mbarrier.try_wait.*){TRY_WAIT}", r"\1mov.pred complete, -1;"),),
        "being multiplied|just read|being copied|more arrivals",
    ),
    (
        "slot never given back",
        ((ARRIVE, ""), (ARRIVE, "")),
        r"deadlock(.|\n)*waits in line \d+(.|\n)*lacks 1 arrivals",
    ),
    (
        "slot given back too early",
        ((PRODUCTS + "1;", "wgmma.wait_group.sync.aligned 3;"),),
        "being multiplied",
    ),
    ("slot given back twice", ((f"(.*)({ARRIVE})", r"\1\2 \2"),), "race|more arrivals|deadlock"),
    ("loader expects too much", ((EXPECT, r"\1, 65536"),), "deadlock"),
    (
        "one of two copies left out",
        ((r"@%p\d+ cp\.async\.bulk\.tensor[^;]*;", ""),),
        r"deadlock(.|\n)*lacks 0 arrivals and 16384 bytes",
    ),
]


@pytest.mark.parametrize("fault", RING, ids=ids)
def test_the_ring_between_loader_and_multipliers(fault: Fault) -> None:
    check(gluon, 90, fault)


# A kernel, a pattern in it and what replaces it; how it is found.
CUDA: list[tuple[str, str, str, str]] = [
    ("select_tile", BARRIER, "", "race in shared memory|uninitialised"),
    ("select_tile", r"bar\.red\.or\.pred \s*(%p\d+), 0, (%p\d+);", r"mov.pred \1, \2;", "race"),
    (
        "select_tile",
        r"atom\.shared\.add\.u32 \s*(%r\d+), (\[%r\d+\]), (%r\d+);",
        r"ld.shared.u32 \1, \2; st.shared.u32 \2, \3;",
        "race",
    ),
    ("transpose_sum", BARRIER, "", "race in shared memory"),
    ("transpose_index", r"st\.global\.u32 \s*(\[%rd\d+)\]", r"st.global.u32 \1+4]", "race|bounds"),
    ("transpose_move", r"st\.global\.u32 \s*(\[%rd\d+)\]", r"st.global.u32 \1+4]", "race|bounds"),
]


def shifted(text: str) -> str:
    """Groups counted from 2: the first is what comes before."""
    return re.sub(r"\\(\d)", lambda match: f"\\g<{int(match[1]) + 1}>", text)


def cuda_calls() -> None:
    """A selection of more than one list and a sort of two digits, checked."""
    torch.manual_seed(0)
    scores = torch.randn(3, 3000)
    _, indices = select_topk(torch.eye(3), scores.T.contiguous(), None, 40, backend="cuda")
    assert indices.equal(scores.sort(dim=1, descending=True, stable=True).indices[:, :40].int())
    latents = torch.randint(300, (70, 8), dtype=torch.int32)
    came = transpose_codes(latents, None, None, 300, backend="cuda")
    wanted = transpose_codes(latents, None, None, 300, backend="reference")
    assert all(a.equal(b) for a, b in zip(came, wanted, strict=True)), "wrong order"


@pytest.mark.parametrize("fault", [None, *CUDA], ids=lambda f: f and f"{f[0]}-{f[1][:5]}")
def test_the_cuda_kernels(fault: tuple[str, str, str, str] | None) -> None:
    if cuda_kernels.unavailable():
        pytest.skip(str(cuda_kernels.unavailable()))
    if fault is None:
        with cuda_kernels.emulated(80):
            cuda_calls()
        return
    name, pattern, replacement, words = fault
    within = rf"(?P<before>\.entry {name}\(.*?)(?:{pattern})"
    with (
        cuda_kernels.emulated(80, replacing(name, (within, r"\g<before>" + shifted(replacement)))),
        pytest.raises((RuntimeError, AssertionError), match=words),
    ):
        cuda_calls()
