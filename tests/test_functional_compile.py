"""The functional form under torch.compile, torch.export and torch.library.opcheck."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.library import opcheck
from torch.utils import _pytree

from sae_kernels import SparseCodes, decode, encode_topk
from sae_kernels.primitives.terms import Gradient
from sae_kernels.testing import CASES, Case, assert_bitwise, assert_within

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("one_thread")
D, F, K = 12, 40, 5
ops = torch.ops.sae_kernels
# Not imported by the functional form.
for _name in ("auxk", "decode_residual", "pick_dead", "row_sqnorm", "row_update"):
    importlib.import_module(f"sae_kernels.primitives.{_name}")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Sae(torch.nn.Module):
    """Encoder and decoder with every optional argument in use."""

    def __init__(self) -> None:
        super().__init__()
        self.W_enc = torch.nn.Parameter(torch.randn(F, D))
        self.b_enc = torch.nn.Parameter(torch.randn(F))
        self.W_dec = torch.nn.Parameter(torch.randn(F, D))
        self.b_dec = torch.nn.Parameter(torch.randn(D))
        self.register_buffer("ends", torch.tensor([10, F], dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, SparseCodes]:
        """The loss of both prefixes, and the codes."""
        scale = self.W_dec.norm(dim=1)
        codes = encode_topk(x, self.W_enc, self.b_enc, K, b_dec=self.b_dec, rank_scale=scale)
        ends = self.get_buffer("ends")
        return decode(codes, self.W_dec, self.b_dec, group_ends=ends) - x, codes


def run(function: Any, sae: Sae, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The outputs and all gradients of a forward and a backward pass."""
    sae.zero_grad()
    x = x.detach().requires_grad_()
    error, codes = function(x)
    error.square().mean().backward()
    grads = {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"error": error, "values": codes.values, "indices": codes.indices, "x": x.grad, **grads}


def test_compiled_once_for_all_batch_sizes_and_equal_to_eager() -> None:
    compiles = 0

    def count(module: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal compiles
        compiles += 1
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    sae = Sae()
    compiled = torch.compile(sae, fullgraph=True, backend=count, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (5, 7, 9, 130):
            x = torch.randn(batch, D)
            eager, ours = run(sae, sae, x), run(compiled, sae, x)
            assert eager.keys() == ours.keys()
            assert len(eager) == 8, "every parameter has a gradient"
            for name, expected in eager.items():
                # The same operators run in both; only torch's own part of the graph may differ.
                slack = 8 * torch.finfo(torch.float32).eps * expected.abs().max()
                assert_within(f"{name} at B={batch}", ours[name], expected, slack)
    assert compiles == 1


def test_a_dynamic_k_and_strings_compile() -> None:
    def values(x: torch.Tensor, W: torch.Tensor, k: int) -> torch.Tensor:
        return encode_topk(x, W, None, k, backend="reference").values

    compiled = torch.compile(values, fullgraph=True, backend="aot_eager", dynamic=True)
    x, W = torch.randn(3, D), torch.randn(F, D)
    for k in (4, 9, 2):
        assert_bitwise(f"k={k}", compiled(x, W, k), values(x, W, k))


def test_autocast_compiles() -> None:
    def error(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return decode(encode_topk(x, W, None, K), W)

    x, W = torch.randn(6, D), torch.randn(F, D)
    compiled = torch.compile(error, fullgraph=True, backend="aot_eager")
    assert_bitwise("x_hat", compiled(x, W), error(x, W))


def test_codes_cross_the_border_of_a_compiled_graph() -> None:
    def double(codes: SparseCodes) -> SparseCodes:
        return SparseCodes(codes.values * 2, codes.indices, codes.n_latents)

    codes = SparseCodes.from_dense(torch.randn(4, F), K)
    out = torch.compile(double, fullgraph=True, backend="aot_eager")(codes)
    assert isinstance(out, SparseCodes)
    assert out.n_latents == F
    assert_bitwise("values", out.values, codes.values * 2)


def test_export_with_a_dynamic_batch() -> None:
    sae = Sae()
    batch = torch.export.Dim("batch", min=2, max=4096)
    with torch.no_grad():
        program = torch.export.export(
            sae, (torch.randn(6, D),), dynamic_shapes=({0: batch},), strict=False
        )
        x = torch.randn(31, D)
        error, codes = program.module()(x)
        expected, expected_codes = sae(x)
    assert isinstance(codes, SparseCodes)
    assert codes.n_latents == F
    assert_bitwise("error", error, expected)
    assert_bitwise("indices", codes.indices, expected_codes.indices)


def test_meta_tensors_give_shapes_and_dtypes() -> None:
    x = torch.empty(2, 3, D, device="meta", dtype=torch.float64)
    W = torch.empty(F, D, device="meta", dtype=torch.bfloat16)
    codes = encode_topk(x, W, None, K)
    out = decode(codes, W, group_ends=torch.empty(4, device="meta", dtype=torch.int32))
    assert (codes.values.shape, codes.values.dtype) == ((2, 3, K), torch.float32)
    assert (codes.indices.shape, codes.indices.dtype) == ((2, 3, K), torch.int32)
    assert (out.shape, out.dtype, out.device.type) == ((4, 2, 3, D), torch.float32, "meta")


def test_tree_map_sees_the_tensors_only() -> None:
    codes = SparseCodes.from_dense(torch.randn(3, F), K)
    leaves, spec = _pytree.tree_flatten(codes)
    assert [leaf is t for leaf, t in zip(leaves, (codes.values, codes.indices), strict=True)]
    again = _pytree.tree_unflatten(leaves, spec)
    assert again.n_latents == F
    wide = _pytree.tree_map(torch.Tensor.double, codes)
    assert wide.values.dtype == torch.float64
    assert wide.n_latents == F
    paths = [_pytree.keystr(path) for path, _ in _pytree.tree_flatten_with_path(codes)[0]]
    assert paths == [".values", ".indices"]


def operator_calls(case: Case) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Every operator with arguments as a training step would have them."""
    x, W, b = (None if t is None else t.nan_to_num(0, 1, -1) for t in case.inputs())
    assert x is not None
    assert W is not None
    values, indices = ops.select_topk(x, W, b, case.K, None, "")
    e = torch.randn(case.B, case.D, dtype=values.dtype)
    bias = torch.randn(case.D, dtype=values.dtype)
    ends = torch.tensor([case.F // 2, case.F], dtype=torch.int32)
    order = ops.transpose_codes(indices, values, None, case.F, "")
    columns = [[t] for t in (*order, values.flatten(), e)]
    none = (None, None, None)
    param, m = (torch.randn(case.F, case.D, dtype=values.dtype) for _ in range(2))
    copy = param.to(torch.bfloat16) if param.dtype == torch.float32 else None
    row_coef = torch.randn(case.F, dtype=values.dtype)
    hyper = torch.tensor([0.1, 1.0, 0.5, 0.5, 0.0, 1.0], dtype=torch.float64)
    adam = (0.9, 0.999, 1e-8, "unit", 1, False)
    since_fired = torch.arange(case.F)
    latents, count = ops.pick_dead(since_fired, max(1, case.F // 2), case.F, "")
    dead = (W, row_coef, param.to(W.dtype), latents, count, 3, 1 / 32)
    for backend in ("cpu", "reference"):
        yield ops.select_topk, (x, W, b, case.K, None, backend)
        yield ops.decode, (values, indices, W, bias, None, backend)
        yield ops.decode, (values, indices, W, None, ends, backend)
        yield ops.decode_residual, (values, indices, W, bias, e, True, backend)
        yield ops.code_grad, (e, indices, W, None, backend)
        yield ops.transpose_codes, (indices, values, None, case.F, backend)
        yield ops.row_grad, (values.flatten(), *columns, *none, case.F, case.D, backend)
        gradient = Gradient(row_coef=row_coef).columns()
        yield ops.row_sqnorm, (param, None, *gradient, "unit", 1, backend)
        part = (*columns, row_coef, None, None)
        yield ops.row_update, (param, m, m.square(), copy, *part, hyper, *adam, backend)
        yield ops.pick_dead, (since_fired, max(1, case.F // 2), 7, backend)
        yield ops.auxk, (x, e, *dead, backend)


FAST_CASES = [case for case in CASES if case.name in ("plain", "no-token", "one-latent")]


def check_operators(case: Case) -> None:
    """The operators' schemas (mutation and aliasing), fakes and traces tell the truth."""
    for operator, args in operator_calls(case):
        opcheck(operator.default, args)


@pytest.mark.parametrize("case", FAST_CASES, ids=lambda case: case.name)
def test_opcheck(case: Case) -> None:
    check_operators(case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_opcheck_over_the_case_table(case: Case, dtype: torch.dtype) -> None:
    check_operators(case.cast(dtype))
