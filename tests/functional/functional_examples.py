"""What the tests of the functional form share: a small SAE, and gradients of dense formulas."""

from __future__ import annotations

import torch

from sae_kernels.testing import assert_within

B, D, F, K = 5, 7, 13, 4
ENDS = torch.tensor([4, 4, 9, F], dtype=torch.int32)
NAMES = ("x", "W_enc", "b_enc", "b_dec", "W_dec")
# Both sides sum some hundred products of numbers below 10 in fp64: 1e3 * 1e3 * u is generous.
SLACK = 1e6 * 2**-53


def operands(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """x, W_enc, b_enc, b_dec, W_dec of a small SAE."""
    return tuple(
        torch.randn(*shape, dtype=torch.float64).to(dtype)
        for shape in ((B, D), (F, D), (F,), (D,), (F, D))
    )


def leaves() -> tuple[torch.Tensor, ...]:
    """The same, each asking for a gradient."""
    return tuple(t.requires_grad_() for t in operands())


def subset_of(names: str, needed: tuple[bool, ...]) -> str:
    """The names of those that need a gradient: a test's id."""
    return "+".join(name for name, need in zip(names.split(), needed, strict=True) if need)


def assert_same_gradients(
    ours: torch.Tensor, theirs: torch.Tensor, tensors: dict[str, torch.Tensor]
) -> None:
    """Raises AssertionError unless both scalars have the same gradients."""
    grads = [torch.autograd.grad(loss, tensors.values()) for loss in (ours, theirs)]
    for name, a, e in zip(tensors, *grads, strict=True):
        assert bool(e.any()), f"{name} has no gradient to be compared with"
        assert_within(name, a, e, SLACK)
