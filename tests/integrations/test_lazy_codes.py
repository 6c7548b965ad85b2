"""LazyCodes answer as the dense tensor does, with its gradient, and say when they became one."""

from __future__ import annotations

import copy
import io
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn import functional as F

from sae_kernels.codes import SparseCodes
from sae_kernels.integrations.lazy_codes import LazyCodes
from sae_kernels.integrations.patching import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable

N = 12
W = torch.randn(N, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
NORMS = torch.rand(N, generator=torch.Generator().manual_seed(6), dtype=torch.float64) + 0.5
W.requires_grad_()
NORMS.requires_grad_()


def codes(form: str) -> SparseCodes:
    """Codes [5, 12] (or [2, 3, 12]) with leaf values, zeros, negatives, an empty row."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, N, generator=generator, dtype=torch.float64)
    if form == "k":
        found = SparseCodes.from_dense(x, 3)
        values = found.values.detach()
        values[:, 2] = 0
        return found.with_values(values.requires_grad_())
    if form == "k of batches":
        found = SparseCodes.from_dense(x.view(2, 3, N), 3)
        return found.with_values(found.values.detach().requires_grad_())
    x = x * (x.abs() > 0.8)
    x[3] = 0
    places = x.nonzero()
    counts = (x != 0).sum(1).cumsum(0).int()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int32), counts])
    values = x[x != 0].detach()
    values[1] = 0
    leading = (2, 3) if form == "ragged of batches" else None
    return SparseCodes(values.requires_grad_(), places[:, 1].int(), N, offsets, leading)


def factors(f: Any) -> torch.Tensor:
    """A number for each token, [..., 1]."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(*f.shape[:-1], 1, generator=generator, dtype=torch.float64)


FORMS = ("k", "k of batches", "ragged", "ragged of batches")
# What entries answer.
SPARSE: dict[str, Callable[[Any], Any]] = {
    "matmul": lambda f: f @ W,
    "torch.matmul": lambda f: torch.matmul(f, W),
    "linear": lambda f: F.linear(f, W.detach().T),
    "linear with a bias": lambda f: F.linear(f, W.T, torch.ones(4, dtype=torch.float64)),
    "scaled by latent": lambda f: (f * NORMS) @ W,
    "scaled from the left": lambda f: (NORMS * f).sum(-1),
    "divided by latent": lambda f: (f / NORMS).sum(-1),
    "halved": lambda f: (f / 2).sum(),
    "by a scalar tensor": lambda f: (f * torch.tensor(3.0)).sum(-1),
    "by a mask of latents": lambda f: (f * (torch.arange(N) > 4)).sum(-1),
    "sum": lambda f: f.sum(),
    "sum by token": lambda f: f.sum(-1),
    "sum by token, kept": lambda f: f.sum(-1, keepdim=True),
    "sum by latent": lambda f: f.sum(tuple(range(f.dim() - 1))),
    "sum by latent, kept": lambda f: f.sum(dim=list(range(f.dim() - 1)), keepdim=True),
    "sum over a dimension of the batch": lambda f: (f**2).sum(0),
    "sum over two": lambda f: f.sum((0, -1)),
    "sum over the last but one": lambda f: f.sum(dim=-2, keepdim=True),
    "mean": lambda f: f.mean(),
    "mean by token": lambda f: f.mean(-1),
    "L0": lambda f: (f > 0).float().sum(-1).mean(),
    "fired": lambda f: f.bool().float().sum(tuple(range(f.dim() - 1))).bool(),
    "below": lambda f: (f < -0.5).sum(),
    "at least": lambda f: (f >= 0.5).sum(-1),
    "not zero": lambda f: (f != 0).sum(),
    "any": lambda f: (f > 1).any(),
    "any by token": lambda f: (f > 1).any(dim=-1),
    "count_nonzero": lambda f: torch.count_nonzero(f, dim=-1),
    "norm": lambda f: f.norm(),
    "norm by token": lambda f: f.norm(p=2, dim=-1),
    "p-norm by token": lambda f: f.norm(p=3.0, dim=-1),
    "vector_norm": lambda f: torch.linalg.vector_norm(f, 1, dim=-1),
    "abs": lambda f: f.abs().sum(-1),
    "relu": lambda f: F.relu(f).sum(-1),
    "tanh": lambda f: torch.tanh(4 * f * NORMS).sum(-1),
    "power": lambda f: (f**2).sum(-1),
    "masked": lambda f: f[f > 0].min(),
    "masked, in order": lambda f: f[f > 0] * 2,
    "times its mask": lambda f: (f * (f > 0.5)).sum(-1),
    "by a factor of each token": lambda f: (f * factors(f)).sum(0),
    "masked tokens": lambda f: f[factors(f)[..., 0] > 0] @ W,
    "nonzero": lambda f: f.nonzero(),
    "nonzero as a tuple": lambda f: torch.stack((f > 0.1).nonzero(as_tuple=True)),
    "flattened without graph": lambda f: (f.detach().reshape(-1, N) != 0).sum(-1),
    "flatten": lambda f: f.detach().flatten(0, f.dim() - 2).sum(0),
    "columns": lambda f: f[..., [3, 1]],
    "columns of a tensor": lambda f: f[..., torch.tensor([0, 11, 0])],
    "detached": lambda f: f.detach().sum(-1),
    "data": lambda f: f.data.sum(-1),
    "to float": lambda f: f.to(torch.float32).double().sum(-1),
    "to its own device": lambda f: f.cpu().sum(-1),
    "to_dense": lambda f: f.to_dense().sum(-1),
}
# What needs the tensor.
DENSE: dict[str, Callable[[Any], Any]] = {
    "slice": lambda f: f[..., 2:5] * 2,
    "one latent": lambda f: f[..., 3],
    "negative index": lambda f: f[..., [-1, 2]],
    "max": lambda f: f.max(dim=-1).values,
    "cat": lambda f: torch.cat([f, f]),
    "add": lambda f: f + 1,
    "zeros": lambda f: (f == 0).all(dim=0),
    "above a negative": lambda f: (f > -0.5).sum(-1),
    "where": lambda f: torch.where(f > 0, f, -1.0),
    "topk": lambda f: f.topk(2).values,
    "einsum": lambda f: torch.einsum("...f,fd->...d", f, W),
    "transposed": lambda f: f.mT @ f,
    "in place": lambda f: f.clone().mul_(2).sum(),
    "allclose": lambda f: torch.tensor(torch.allclose(f, f.clone())),
    "numpy": lambda f: torch.from_numpy(f.detach().numpy().copy()),
    "tolist": lambda f: torch.tensor(f.tolist()),
    "reshape": lambda f: f.reshape(-1, N).sum(0),
    "0 to the 0": lambda f: (f**0).sum(),
    "inverse": lambda f: (1 / (f + 10)).sum(),
}


def outcome(function: Callable[[Any], Any], tensor: Any, values: torch.Tensor) -> list[Any]:
    """The answer and its gradients with respect to the entries' values, W and NORMS."""
    leaves = (values, W, NORMS)
    for leaf in leaves:
        leaf.grad = None
    found = function(tensor)
    if found.requires_grad:
        found.square().sum().backward()
    return [found.detach() + 0 if found.dtype != torch.bool else found, *(p.grad for p in leaves)]


@pytest.mark.filterwarnings("ignore:W_dec:UserWarning")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*SPARSE, *DENSE])
def test_it_answers_as_the_dense_tensor(name: str, form: str) -> None:
    function = (SPARSE | DENSE)[name]
    c, d = codes(form), codes(form)
    ledger = Ledger("test")
    found = outcome(function, LazyCodes.of(c, ledger), c.values)
    expected = outcome(function, d.to_dense(), d.values)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert mine.dtype == theirs.dtype
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert bool(ledger.dense) == (name in DENSE), ledger.dense


def test_it_has_the_tensor_s_looks() -> None:
    c = codes("k of batches")
    f = LazyCodes.of(c)
    assert f.shape == (2, 3, N)
    assert f.dtype == torch.float64
    assert f.device == c.values.device
    assert f.requires_grad
    assert not f.is_leaf
    assert not f.is_sparse
    assert repr(f) == ("LazyCodes(shape=(2, 3, 12), dtype=torch.float64, entries=18, dense=False)")
    with torch.no_grad():
        assert not LazyCodes.of(c).requires_grad


def test_it_becomes_dense_once() -> None:
    ledger = Ledger("test")
    f = LazyCodes.of(codes("k"), ledger)
    f.max()
    f.min()
    torch.testing.assert_close((f + 1).sum(), f.sum() + f.numel())
    assert ledger.dense == {"max": 1}
    assert f.dense().data_ptr() == f.dense().data_ptr()


def test_in_inference_mode() -> None:
    with torch.inference_mode():
        f = LazyCodes.of(codes("ragged"))
        dense = codes("ragged").to_dense()
        for use in (lambda f: f.sum(-1), lambda f: f.max(), lambda f: f[:, 2:4], lambda f: f @ W):
            assert torch.allclose(use(f), use(dense))
        f[:, 3] = 1
        assert bool((f[:, 3] == 1).all())


def test_what_is_written_is_there_for_all_aliases() -> None:
    with torch.no_grad():
        f = LazyCodes.of(codes("k"))
        alias, part = f.detach(), f[:, 3]
        expected = f + 0
        f[:, :2] = 7
        expected[:, :2] = 7
        part.fill_(5)
        expected[:, 3] = 5
        alias.mul_(2)
        expected *= 2
        for each in (f, alias):
            assert torch.equal(each.sum(-1), expected.sum(-1))
            assert torch.equal(each + 0, expected)
        other = LazyCodes.of(codes("k of batches"))
        flat = other.view(-1, N)
        other.detach().view(6, N)[2, :] = 9
        assert float(flat[2].sum()) == float(other[0, 2].sum()) == 9 * N
        f.detach().numpy()[0, 0] = 100
        assert float(f.max()) == 100


def test_a_write_under_autograd_has_torch_s_gradient() -> None:
    def gradient(f: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        f = f * 1
        f[:, :6] = 0
        f[:, 7].mul_(3)
        (f @ W).square().sum().backward()
        assert values.grad is not None
        return values.grad

    c, d = codes("k"), codes("k")
    expected = gradient(d.to_dense(), d.values)
    torch.testing.assert_close(gradient(LazyCodes.of(c), c.values), expected)


def test_gradients_at_the_codes() -> None:
    def gradients(f: torch.Tensor) -> list[torch.Tensor]:
        f.retain_grad()
        seen: list[torch.Tensor] = []
        f.register_hook(seen.append)
        (f @ W).square().sum().backward()
        assert f.grad is not None
        return [f.grad, *seen]

    found, expected = gradients(LazyCodes.of(codes("k"))), gradients(codes("k").to_dense())
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    f = LazyCodes.of(codes("k"))
    (f > 0).sum()
    f.retain_grad()  # a count is not a use that has a gradient
    g = LazyCodes.of(codes("k"))
    g.sum()
    with pytest.raises(RuntimeError, match="asked for it before the codes are used"):
        g.register_hook(print)


def test_a_leaf_of_ones_own_gets_the_gradient() -> None:
    leaf = LazyCodes.of(codes("ragged")).detach().requires_grad_()
    dense = codes("ragged").to_dense().detach().requires_grad_()
    for each in (leaf, dense):
        (each @ W).square().sum().backward()
    torch.testing.assert_close(leaf.grad, dense.grad)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 2


def test_somebody_s_function_and_module_hooks_keep_the_gradient() -> None:
    module = torch.nn.Identity()
    module.register_full_backward_hook(lambda *_: None)
    for through in (Doubled.apply, lambda f: 2 * module(f)):
        c = codes("k")
        through(LazyCodes.of(c)).sum().backward()
        assert c.values.grad is not None
        assert c.values.grad.unique().tolist() == [2]


def test_copies_are_dense_tensors() -> None:
    f = LazyCodes.of(codes("ragged")).detach()
    file = io.BytesIO()
    torch.save(f, file)
    file.seek(0)
    for each in (torch.load(file, weights_only=True), copy.deepcopy(f)):
        assert type(each) is torch.Tensor
        assert torch.equal(each, f + 0)
    assert f.untyped_storage().nbytes() == f.numel() * 8
    assert f.data_ptr() == f.dense().data_ptr()
