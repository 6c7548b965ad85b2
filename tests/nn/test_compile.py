"""Modules of every architecture under torch.compile(fullgraph=True): eager's bits, one graph."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from sae_kernels.nn import BatchTopKSAE, CrossLayerBatchTopKConfig
from sae_kernels.testing import assert_bitwise, assert_within
from tests.nn.modules import CASES, each, sae_of, scaled, x_of
from tests.torch_versions import one_graph

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable, Iterator

    from sae_kernels.nn import SAEConfig, SparseAutoencoder
    from sae_kernels.nn.base import SAEOutput

pytestmark = [pytest.mark.usefixtures("one_thread"), one_graph]
PRIMITIVES = (
    "code_grad",
    "decode",
    "route_top1",
    "row_grad",
    "select_batch_topk",
    "select_threshold",
    "select_topk",
    "select_topk_routed",
    "transpose_codes",
)
modes = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
batches = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
# One of each way to select and to activate.
KINDS = ("topk", "batchtopk-ranked", "jumprelu-log", "relu", "gated", "switch-shared")
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Any, dynamic: bool = True, backend: str = "aot_eager") -> Any:
    """The function as one graph: a break in it is an error."""
    return torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)


def compiled_once() -> contextlib.AbstractContextManager[Any]:
    """Makes it an error to compile again what has been compiled."""
    patch: contextlib.AbstractContextManager[Any] = torch._dynamo.config.patch(
        error_on_recompile=True
    )
    return patch


def ready(config: SAEConfig, train: bool) -> SparseAutoencoder:
    """With scales on both sides."""
    return sae_of(scaled(config, 3.0, 0.5)).train(train)


def outcome(function: Callable[[Tensor], SAEOutput], sae: SparseAutoencoder, x: Tensor) -> Any:
    """What a pass leaves behind, by name; with all gradients where the SAE is in training."""
    x = x.detach().requires_grad_()
    sae.zero_grad()
    x_hat, codes = function(x)
    result = {"x_hat": x_hat, "values": codes.values, "indices": codes.indices}
    if sae.training:
        (x_hat.square().mean() + codes.values.sum()).backward()
        assert x.grad is not None
        # What only leads to an output of the graph that no loss is of gets zeros there, else None.
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in _trained(sae)}
        result |= {"x.grad": x.grad, **{f"{name}.grad": grad for name, grad in grads.items()}}
    return result | {name: buffer.clone() for name, buffer in sae.named_buffers()}


def _trained(sae: SparseAutoencoder) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in sae.named_parameters() if p.requires_grad]


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], where: object) -> None:
    """The same names and bits."""
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        assert_bitwise(f"{name} of {where}", got[name].reshape(-1), want.reshape(-1))


@pytest.mark.sampled(8)
@each
@modes
@batches
def test_every_architecture_is_one_graph_with_the_bits_of_eager(
    config: SAEConfig, train: bool, dynamic: bool
) -> None:
    if train and isinstance(config, CrossLayerBatchTopKConfig):
        pytest.skip("layers that share one k in training: the host reads the last batch's key")
    sae = ready(config, train)
    twin = copy.deepcopy(sae)
    function = compiled(sae, dynamic)
    with compiled_once():
        # The second batch meets what the first has left in the buffers.
        for n_tokens in (24, 7, 130) if dynamic else (24, 24):
            x = x_of(config, n_tokens)
            ours, eager = outcome(function, sae, x), outcome(twin, twin, x)
            assert_same(ours, eager, f"{n_tokens} tokens")
    assert all(p.grad is not None for _, p in _trained(sae)) is train


@pytest.mark.sampled(6)
@kinds
def test_every_backend_is_one_graph(kind: str, backend: str) -> None:
    sae = ready(CASES[kind], train=True)
    sae.backend = backend
    twin = copy.deepcopy(sae)
    x = x_of(CASES[kind], 12)
    assert_same(outcome(compiled(sae), sae, x), outcome(twin, twin, x), backend)


# A ReLU selects as a JumpReLU does, and nothing comes after that.
@pytest.mark.full
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "relu"])
@modes
@batches
def test_any_leading_shape_and_no_token_at_all(kind: str, train: bool, dynamic: bool) -> None:
    sae = ready(CASES[kind], train)
    twin = copy.deepcopy(sae)
    for shape in ((), (1,), (4, 0), (2, 1, 3)):
        torch._dynamo.reset()
        x = x_of(CASES[kind], *shape)
        assert_same(outcome(compiled(sae, dynamic), sae, x), outcome(twin, twin, x), shape)


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.sampled(3)
@kinds
@modes
@pytest.mark.parametrize("name", SURROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_surrounds_the_call(kind: str, train: bool, name: str, dtype: torch.dtype) -> None:
    sae = ready(CASES[kind], train)
    twin = copy.deepcopy(sae)
    function = compiled(sae)
    for n_tokens in (24, 7):
        x = x_of(CASES[kind], n_tokens).to(dtype)
        with SURROUNDINGS[name]():
            got, want = function(x), twin(x)
        assert_bitwise("x_hat", got.x_hat, want.x_hat)
        assert_bitwise("values", got.codes.values, want.codes.values)
        assert_bitwise("indices", got.codes.indices, want.codes.indices)
    for (what, ours), (_, theirs) in zip(sae.named_buffers(), twin.named_buffers(), strict=True):
        assert_bitwise(what, ours[None], theirs[None])


@pytest.mark.sampled(3)
@kinds
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_a_module_in_evaluation_is_exported_with_a_dynamic_batch(kind: str, strict: bool) -> None:
    config = CASES[kind]
    sae = ready(config, train=False)
    batch = torch.export.Dim("batch", min=2, max=4096)
    with torch.no_grad():
        program = torch.export.export(
            sae, (x_of(config, 6),), dynamic_shapes=({0: batch},), strict=strict
        )
        got, want = program.module()(x_of(config, 31)), sae(x_of(config, 31))
    assert_bitwise("x_hat", got.x_hat, want.x_hat)
    assert_bitwise("values", got.codes.values, want.codes.values)
    assert_bitwise("indices", got.codes.indices, want.codes.indices)


@pytest.mark.parametrize("rule", ["sae_lens", "dictionary_learning"])
def test_the_running_threshold_moves_in_a_graph_as_it_does_outside(rule: Any) -> None:
    config = CASES["batchtopk"]
    sae = BatchTopKSAE(config.d_in, config.n_latents, k=3.5, threshold_rule=rule)
    twin = copy.deepcopy(sae)

    def step(sae: BatchTopKSAE, x: Tensor, finite: Tensor) -> Tensor:
        codes = sae.encode(x)
        sae.after_step_(finite)
        return codes.values

    function = compiled(step)
    seen = []
    # A step that was skipped, one without a token, and one of NaN.
    for n_tokens, finite in ((24, True), (7, False), (30, True), (0, True), (9, True)):
        x = x_of(config, n_tokens) if n_tokens != 9 else torch.full((9, config.d_in), torch.nan)
        for module, run in ((sae, function), (twin, step)):
            run(module, x, torch.tensor(finite))
        for name, buffer in twin.named_buffers():
            assert_bitwise(f"{name} after {n_tokens}", sae.get_buffer(name)[None], buffer[None])
        seen.append(float(sae.threshold))
    assert seen[0] == seen[1] != seen[2] == seen[3] == seen[4]


@pytest.mark.full
@pytest.mark.sampled(3)
@kinds
@modes
def test_inductor_compiles_it_too(kind: str, train: bool) -> None:
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        pytest.skip("torch's inductor finds no C++ compiler on this machine")
    sae = ready(CASES[kind], train)
    twin = copy.deepcopy(sae)
    function = compiled(sae, backend="inductor")
    for n_tokens in (24, 7):
        x = x_of(CASES[kind], n_tokens)
        ours, eager = outcome(function, sae, x), outcome(twin, twin, x)
        assert ours.keys() == eager.keys()
        assert_bitwise("indices", ours["indices"], eager["indices"])
        for name, want in eager.items():
            # The kernels get operands that inductor has fused: the centring may be an FMA.
            slack = 64 * torch.finfo(torch.float32).eps * float(want.detach().double().abs().amax())
            assert_within(f"{name} of {n_tokens} tokens", ours[name], want, slack)
