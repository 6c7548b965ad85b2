"""The functional form under torch.compile, torch.export and torch.library.opcheck."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.library import opcheck
from torch.utils import _pytree

from sae_kernels import SparseCodes, decode, encode_topk
from sae_kernels.functional import (
    encode_batch_topk,
    encode_jumprelu,
    encode_threshold,
    heaviside_ste,
    jumprelu,
)
from sae_kernels.primitives.narrow import narrowed
from sae_kernels.testing import CASES, Case, assert_bitwise, assert_within, oracles
from tests.torch_versions import one_graph

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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


@one_graph
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


class Ragged(Sae):
    """The same with an encoder of ragged codes."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.threshold = torch.nn.Parameter(torch.rand(F))
        self.encode = ENCODERS[name]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, SparseCodes]:
        """The error of both prefixes, with what the encoder adds to it, and the codes."""
        codes, more = self.encode(self, x)
        ends = self.get_buffer("ends")
        error = decode(codes, self.W_dec, self.b_dec, group_ends=ends) - x
        return error + more + 0 * self.threshold.sum(), codes


def _jumprelu_and_step(sae: Ragged, x: torch.Tensor) -> tuple[SparseCodes, Any]:
    lower = sae.threshold.detach() - 0.25
    preacts = encode_threshold(x, sae.W_enc, sae.b_enc, lower, b_dec=sae.b_dec)
    return jumprelu(preacts, sae.threshold, 0.5), heaviside_ste(
        preacts, sae.threshold, 0.5
    ).sum() / x.shape[0]


ENCODERS: dict[str, Callable[[Ragged, torch.Tensor], tuple[SparseCodes, Any]]] = {
    "relu": lambda sae, x: (encode_threshold(x, sae.W_enc, sae.b_enc, 0.0, b_dec=sae.b_dec), 0),
    "batch_topk": lambda sae, x: (
        encode_batch_topk(
            x, sae.W_enc, sae.b_enc, 2.5, b_dec=sae.b_dec, rank_scale=sae.W_dec.norm(dim=1)
        ),
        0,
    ),
    "leading": lambda sae, x: (
        encode_threshold(x[None], sae.W_enc, sae.b_enc, 0.1, b_dec=sae.b_dec),
        0,
    ),
    "jumprelu": lambda sae, x: (
        encode_jumprelu(x, sae.W_enc, sae.b_enc, sae.threshold, bandwidth=0.5, b_dec=sae.b_dec),
        0,
    ),
    "jumprelu and step": _jumprelu_and_step,
}


def assert_like_eager(sae: Ragged, compiled: Any, n_tokens: int) -> None:
    """Raises AssertionError unless outputs and all gradients are those of eager mode."""
    x = torch.randn(n_tokens, D)
    eager, ours = run(sae, sae, x), run(compiled, sae, x)
    assert eager.keys() == ours.keys()
    assert len(eager) == 9, "every parameter has a gradient"
    for name, expected in eager.items():
        slack = 8 * torch.finfo(torch.float32).eps * expected.abs().max()
        assert_within(f"{name} of {n_tokens} tokens", ours[name], expected, slack)


@one_graph
@pytest.mark.full
@pytest.mark.parametrize("name", ENCODERS)
def test_ragged_codes_compile_once_for_all_numbers_of_tokens_and_entries(name: str) -> None:
    # Dynamo takes an operator whose output's size depends on data into a graph only where it is
    # told to; fullgraph=True does.
    compiles = 0

    def count(module: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal compiles
        compiles += 1
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    sae = Ragged(name)
    compiled = torch.compile(sae, fullgraph=True, backend=count, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n_tokens in (5, 7, 130):
            assert_like_eager(sae, compiled, n_tokens)
    assert compiles == 1


@one_graph
@pytest.mark.full
@pytest.mark.parametrize("name", ["batch_topk", "jumprelu and step"])
def test_where_the_graph_breaks_at_ragged_codes_the_result_is_the_same(name: str) -> None:
    # Then what runs an operator must not be compiled in pieces: kernels have been given addresses.
    sae = Ragged(name)
    compiled = torch.compile(sae, backend="aot_eager")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=False):
        for n_tokens in (5, 7):
            assert_like_eager(sae, compiled, n_tokens)


@one_graph
@pytest.mark.full
def test_a_number_of_latents_may_change_too() -> None:
    def total(x: torch.Tensor, W: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
        codes = encode_jumprelu(x, W, None, threshold, bandwidth=1.0)
        return decode(codes, W).square().sum() + codes.values.sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager", dynamic=True)
    for n_latents in (F, 2 * F):
        arguments = [torch.randn(6, D), torch.randn(n_latents, D), torch.rand(n_latents)]
        leaves = [t.requires_grad_() for t in arguments]
        grads = [torch.autograd.grad(f(*leaves), leaves) for f in (compiled, total)]
        for name, a, e in zip(("x", "W", "threshold"), *grads, strict=True):
            slack = 8 * torch.finfo(torch.float32).eps * e.abs().max()
            assert_within(name, a, e, slack)


@one_graph
def test_a_dynamic_k_and_strings_compile() -> None:
    def values(x: torch.Tensor, W: torch.Tensor, k: int) -> torch.Tensor:
        return encode_topk(x, W, None, k, backend="reference").values

    compiled = torch.compile(values, fullgraph=True, backend="aot_eager", dynamic=True)
    x, W = torch.randn(3, D), torch.randn(F, D)
    for k in (4, 9, 2):
        assert_bitwise(f"k={k}", compiled(x, W, k), values(x, W, k))


@one_graph
def test_autocast_compiles() -> None:
    def error(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return decode(encode_topk(x, W, None, K), W)

    x, W = torch.randn(6, D), torch.randn(F, D)
    compiled = torch.compile(error, fullgraph=True, backend="aot_eager")
    assert_bitwise("x_hat", compiled(x, W), error(x, W))


@one_graph
def test_codes_cross_the_border_of_a_compiled_graph() -> None:
    def double(codes: SparseCodes) -> SparseCodes:
        return codes.with_values(codes.values * 2)

    ragged = encode_threshold(torch.randn(2, 3, D), torch.randn(F, D), None, 0.0)
    for codes in (SparseCodes.from_dense(torch.randn(4, F), K), ragged):
        out = torch.compile(double, fullgraph=True, backend="aot_eager")(codes)
        assert isinstance(out, SparseCodes)
        assert (out.n_latents, out.batch_shape) == (F, codes.batch_shape)
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


@pytest.mark.parametrize("leading", [None, (2, 2), ()], ids=str)
def test_tree_map_of_ragged_codes(leading: tuple[int, ...] | None) -> None:
    x = torch.randn(4, D) if leading is None else torch.randn(*leading, D)
    codes = encode_threshold(x, torch.randn(F, D), None, 0.5)
    leaves, spec = _pytree.tree_flatten(codes)
    tensors = (codes.values, codes.indices, codes.offsets)
    assert [leaf is t for leaf, t in zip(leaves, tensors, strict=True)] == [True] * 3
    for structure in (spec, _pytree.treespec_loads(_pytree.treespec_dumps(spec))):
        again = _pytree.tree_unflatten(leaves, structure)
        assert again.offsets is codes.offsets
        assert (again.n_latents, again.leading) == (F, leading)
        assert again.batch_shape == codes.batch_shape
        assert_bitwise("codes", again.to_dense(), codes.to_dense())
    paths = [_pytree.keystr(path) for path, _ in _pytree.tree_flatten_with_path(codes)[0]]
    assert paths == [".values", ".indices", ".offsets"]
    other = encode_threshold(x[..., None, :], torch.randn(F, D), None, 0.5)
    assert _pytree.tree_structure(other) != spec


def operator_calls(case: Case) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Every operator with arguments as a training step would have them."""
    x, W, b = (None if t is None else t.nan_to_num(0, 1, -1) for t in case.inputs())
    assert x is not None
    assert W is not None
    values, indices = ops.select_topk(x, W, b, case.K, None, None, False, None, "")
    e = torch.randn(case.B, case.D, dtype=values.dtype)
    bias = torch.randn(case.D, dtype=values.dtype)
    ends = torch.tensor([case.F // 2, case.F], dtype=torch.int32)
    order = ops.transpose_codes(indices, values, None, case.F, "")
    columns = [[t] for t in (*order, values.flatten(), e)]
    param, m = (torch.randn(case.F, case.D, dtype=values.dtype) for _ in range(2))
    copy = param.to(torch.bfloat16) if param.dtype == torch.float32 else None
    row_coef = torch.randn(case.F, dtype=values.dtype)
    hyper = torch.tensor([0.1, 1.0, 0.5, 0.5, 0.0, 1.0], dtype=torch.float64)
    adam = ([0.9, 0.999], 1e-8, "unit", 1, False)
    since_fired = torch.arange(case.F)
    latents, count = ops.pick_dead(since_fired, max(1, case.F // 2), case.F, "")
    dead = (W, row_coef, param.to(W.dtype), latents, count, 3, 1 / 32)
    ragged = ops.select_threshold(x, W, b, row_coef, None, "")
    parts = param[:, : next(n for n in (3, 2, 1) if case.D % n == 0)].contiguous()
    both, weights = torch.stack([e, e]), torch.rand(2, dtype=values.dtype)
    n_experts = next(n for n in (3, 2, 1) if case.F % n == 0)
    routes = oracles.routes(torch.arange(case.B) % n_experts, n_experts)
    k_routed = min(case.K, case.F // n_experts)
    for backend, rows in (("cpu", None), ("cpu", narrowed(W)), ("reference", None)):
        yield ops.select_topk, (x, W, b, case.K, None, rows, False, None, backend)
        yield ops.route_top1, (x, W, b, backend)
        yield ops.select_topk_routed, (x, W, b, k_routed, *routes, rows, backend)
        yield ops.select_threshold, (x, W, b, row_coef, rows, backend)
        yield ops.select_batch_topk, (x, W, b, case.B * case.K, None, None, backend)
        guess = torch.ones((), dtype=values.dtype)
        yield ops.select_batch_topk, (x, W, b, case.B, row_coef.abs(), guess, backend)
        yield ops.decode, (values, indices, W, bias, None, None, 1, backend)
        yield ops.decode, (values, indices, W, None, ends, None, 1, backend)
        yield ops.decode, (*ragged[:2], W, bias, ends, ragged[2], 1, backend)
        codes = (values, indices, W, bias, e, True)
        yield ops.decode_residual, (*codes, None, None, None, 1, backend)
        yield ops.decode_residual, (*codes, ends, weights, None, 1, backend)
        of_ragged = (*ragged[:2], W, bias, e, True)
        yield ops.decode_residual, (*of_ragged, None, None, ragged[2], 1, backend)
        yield ops.decode_residual, (*of_ragged, ends, None, ragged[2], 1, backend)
        yield ops.code_grad, (e, indices, W, None, None, backend)
        yield ops.code_grad, (both, ragged[1], W, ends, ragged[2], backend)
        yield ops.transpose_codes, (indices, values, None, case.F, backend)
        yield ops.row_grad, (*columns, case.F, case.D, None, None, backend)
        yield ops.row_grad, (*columns, case.F, case.D, W.dtype, W, backend)
        for coef in (row_coef, parts):
            part = ([], [], [], [], [], coef, None, None)
            yield ops.row_sqnorm, (param, *part, None, "unit", 1, backend)
            part = (*columns, coef, None, None)
            yield ops.row_update, (param, m, m.square(), copy, *part, hyper, *adam, backend)
        yield ops.pick_dead, (since_fired, max(1, case.F // 2), 7, backend)
        variance = None if len(x) > 1 else e.new_tensor(3.0)  # one token has none: NaN
        yield ops.auxk, (x, e, *dead, variance, backend)
        wider = torch.cat([param, param], 1).to(W.dtype)
        narrow = (W, row_coef, wider, latents, count, 3, 1 / 32)
        yield ops.auxk, (x, torch.cat([e, e], 1), *narrow, e.new_tensor(3.0), backend)


FAST_CASES = [case for case in CASES if case.name in ("plain", "no-token", "one-latent")]


def check_operators(case: Case) -> None:
    """The operators' schemas (mutation and aliasing), fakes and traces tell the truth."""
    for operator, args in operator_calls(case):
        opcheck(operator.default, args)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("case", FAST_CASES, ids=lambda case: case.name)
def test_opcheck(case: Case) -> None:
    check_operators(case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_opcheck_over_the_case_table(case: Case, dtype: torch.dtype) -> None:
    check_operators(case.cast(dtype))
