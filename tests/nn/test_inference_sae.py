"""InferenceSAE: the function of the SAE it was made from, in every architecture and dtype."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from sae_kernels.nn import SAEConfig, TopKSAE
from sae_kernels.nn.inference import InferenceSAE
from sae_kernels.testing import assert_bitwise, gamma
from tests.nn.modules import CASES, each, sae_of, scaled, x_of

COUNTS = (1, 3, 16, 17)  # tokens; the last are no longer few


def output(sae: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        x_hat, codes = sae(x)
    return x_hat, codes.to_dense()


@each
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_function_is_that_of_the_sae(config: SAEConfig, scale: float) -> None:
    sae = sae_of(scaled(config, scale, 1.7)).double()
    frozen = sae.for_inference()
    assert frozen.W_dec.dtype == torch.float64
    assert not frozen.config.subtract_b_dec
    x = x_of(config, 2, 5).double()
    wanted, came = output(sae.folded(), x), output(frozen, x)
    for one, other in zip(came, wanted, strict=True):
        # In fp64, through two products of about 10 terms of at most 100.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert bool(((came[1] != 0) == (wanted[1] != 0)).all())


@each
def test_bf16_rounds_matrices_alone(config: SAEConfig) -> None:
    sae, x = sae_of(config), x_of(config, 16).bfloat16().float()
    frozen = sae.for_inference(torch.bfloat16)
    came, norms = output(frozen, x), frozen.sae.kept_rank_scale
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(p.bfloat16() if p.dim() > 1 else p)
    twin = sae.double().for_inference()
    twin.sae.kept_rank_scale = None if norms is None else norms.double()  # of matrices unrounded
    wanted = output(twin, x.double())
    # Sums in fp32 of products that are exact: of pre-activations, gates and reconstructions.
    tolerance = gamma(60, torch.float32) * float(wanted[0].abs().max() + wanted[1].abs().max()) * 16
    if config.skip:  # its product is torch's, which rounds the result to bf16
        tolerance += 2**-7 * float(wanted[0].abs().max())
    for one, other in zip(came, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance)


@each
@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_int8_gives_the_codes_of_its_rows_bit_for_bit(config: SAEConfig, rows: torch.dtype) -> None:
    sae = sae_of(config)
    narrow, wide = sae.for_inference(torch.int8, rows=rows), sae.for_inference(rows)
    for n in COUNTS:
        x = x_of(config, n)
        for name, came, expected in zip(
            ("x_hat", "codes"), output(narrow, x), output(wide, x), strict=True
        ):
            assert_bitwise(f"{name} of {n} tokens", came, expected)


@pytest.mark.parametrize("name", ["topk", "relu", "switch", "switch-shared"])
def test_int8_rows_are_what_few_tokens_read(name: str) -> None:
    # Rows that bound all scores falsely, as zero: nothing but the bias is left to choose by.
    sae = sae_of(CASES[name]).for_inference(torch.int8)
    x = x_of(CASES[name], 17)
    right = sae.encode(x).to_dense()
    assert sae.sae.narrow is not None
    sae.sae.narrow.zero_()
    assert_bitwise("more than a few", sae.encode(x).to_dense(), right)
    assert not torch.equal(sae.encode(x[:16]).to_dense(), right[:16])


def test_the_default_dtype_is_the_one_that_the_sae_computes_in() -> None:
    sae = TopKSAE(9, 50, k=4, compute_dtype=torch.bfloat16)
    assert sae.for_inference().W_dec.dtype == torch.bfloat16
    assert sae.for_inference(torch.int8).W_dec.dtype == torch.bfloat16
    assert sae.for_inference(torch.float32).compute_dtype == torch.float32
    assert TopKSAE(9, 50, k=4).for_inference().W_dec.dtype == torch.float32


def test_it_is_a_frozen_copy() -> None:
    sae = sae_of(CASES["batchtopk-ranked"])
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    frozen, x = sae.for_inference(), x_of(CASES["batchtopk-ranked"], 3).requires_grad_()
    codes = frozen.encode(x)
    for name, tensor in sae.state_dict().items():
        assert_bitwise(name, tensor.view(-1), before[name].view(-1))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(1)
    torch.nn.Sequential(frozen).train()
    assert not frozen.sae.training
    again = frozen(x)
    assert_bitwise("codes", again.codes.values, codes.values)
    assert not any(t.requires_grad for t in (*again, codes.values) if isinstance(t, torch.Tensor))
    assert not any(p.requires_grad for p in frozen.parameters())
    frozen.requires_grad_(False)
    with torch.no_grad():
        frozen.sae.W_dec.zero_()  # norms that rank latents were read once
    assert_bitwise("codes by kept norms", frozen.encode(x).values, codes.values)


def test_some_latents_alone() -> None:
    frozen, x = sae_of(CASES["jumprelu-log"]).for_inference(torch.int8), x_of(CASES["topk"], 3)
    some = frozen.encode_latents(x, [3, 40])
    assert_bitwise("codes", some, frozen.encode(x).columns([3, 40]))
    assert torch.equal(frozen.fires(x, [3, 40]), some != 0)


@pytest.mark.parametrize(
    ("dtype", "rows", "message"),
    [
        (torch.int32, None, "dtype: expected float32, bfloat16, float16, float64 or int8"),
        (torch.int8, torch.int8, "got torch.int8"),
        (torch.float32, torch.bfloat16, "rows: expected none but beside dtype=torch.int8"),
    ],
)
def test_refusals(dtype: torch.dtype, rows: torch.dtype | None, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        InferenceSAE(TopKSAE(9, 50, k=4), dtype, rows=rows)


def test_narrow_rows_of_other_weights_are_refused() -> None:
    sae = TopKSAE(9, 50, k=4).for_inference(torch.int8)
    sae.sae.compute_dtype = torch.bfloat16
    with pytest.raises(ValueError, match="narrow: expected W_enc in the dtype of the product"):
        sae.encode(torch.randn(1, 9))


@pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE") or not Path("/proc/self/smaps").exists(),
    reason="only Linux has huge pages for who asks, and says who asked",
)
def test_matrices_ask_for_huge_pages() -> None:
    sae = TopKSAE(256, 1 << 15, k=1)
    small = sae.for_inference(torch.bfloat16)
    assert asked_for_huge_pages(small.sae.W_enc)
    assert asked_for_huge_pages(small.W_dec)
    assert not asked_for_huge_pages(sae.W_enc)
    assert torch.equal(small.W_dec, sae.W_dec.bfloat16())


def asked_for_huge_pages(tensor: torch.Tensor) -> bool:
    """Whether the memory in the middle of a tensor is of a mapping with this advice."""
    middle, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            start, stop = (int(end, 16) for end in first.split("-"))
            inside = start <= middle < stop
        elif inside and first == "VmFlags:":
            return "hg" in rest
    raise AssertionError("expected the tensor's address among the process's mappings")
