"""sparsify's passes over whole weights, done in pieces that stay in a core's cache.

Its default optimizer, schedule-free signum, is ten operations of torch one after the other over
every weight, each a way to memory and back; the removal of the decoder gradient's radial part is
four. Here all operations of a pass run on one piece of the weights before the next piece is
touched. They are the same operations on each element in the same order: so are the results, bit by
bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sae_kernels.integrations.adapters import Installation

# Elements of a piece for each thread: weight, average, gradient and sign of it are 1 MiB in fp32,
# what a core's second cache holds. Half and twice as many take as long.
_PIECE = 1 << 16
_OPTIMIZER = "optimizer step"
_PROJECTION = "decoder gradient's projection"


def schedule_free_step(installation: Installation, sign_descent: type) -> Callable[..., Any]:
    """Makes ``ScheduleFreeWrapper.step`` for a base of the type ``sign_descent``."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
            if type(self.base) is not sign_descent:
                return original(self, closure)  # another library's optimizer, as like as not
            if not installation.ledger.takes(_OPTIMIZER, _why_not_the_step(self, closure)):
                return original(self, closure)
            for group in self.param_groups:
                _descend(self, group)
            return None

        return step

    return make


def remove_radial_part(installation: Installation) -> Callable[..., Any]:
    """Makes ``SparseCoder.remove_gradient_parallel_to_decoder_directions``."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def remove(self: Any) -> None:
            if not installation.covers(self):
                original(self)
                return
            rows, grad = self.W_dec, getattr(self.W_dec, "grad", None)
            if grad is None or _not_plain(rows, grad):
                why = "no gradient" if grad is None else _not_plain(rows, grad)
                installation.ledger.left(_PROJECTION, str(why))
                original(self)
                return
            installation.ledger.took(_PROJECTION)
            height = max(1, _PIECE * torch.get_num_threads() // rows.shape[1])
            with torch.no_grad():
                for g, w in zip(grad.split(height), rows.split(height), strict=True):
                    radial = torch.einsum("fd,fd->f", g, w)
                    g.sub_(radial[:, None] * w)

        return remove

    return make


def _descend(wrapper: Any, group: dict[str, Any]) -> None:
    """One group's step of schedule-free sign descent (arXiv 2405.15682, 1802.04434).

    A weight holds ``y``, its state ``z`` and, between the two, the average ``x``:
    ``z -= lr sign(g)``, ``x += c (z - x)`` and ``y = x + (1 - momentum)(z - x)``.
    """
    lr, momentum = group["lr"], wrapper.momentum
    count, scaled = group.get("k", 0), lr * group.get("d", 1.0)
    largest = group["lr_max"] = max(scaled, group.get("lr_max", 0))
    weight = ((count + 1) ** wrapper.r) * (largest**wrapper.weight_lr_power)
    total = group["weight_sum"] = group.get("weight_sum", 0.0) + weight
    share = weight / total
    for p in group["params"]:
        if p.grad is None:
            continue
        state = wrapper.state[p]
        if "z" not in state:
            state["z"] = torch.clone(p, memory_format=torch.preserve_format)
        with torch.no_grad():
            for y, z, g in _pieces(p, state["z"], p.grad):
                y.lerp_(end=z, weight=1 - 1 / momentum)  # y becomes x
                z.add_(g.sign(), alpha=-lr)
                y.lerp_(end=z, weight=share)
                y.lerp_(end=z, weight=1 - momentum)
    group["k"] = count + 1


def _pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    size = _PIECE * torch.get_num_threads()
    yield from zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True)


def _why_not_the_step(wrapper: Any, closure: object) -> str | None:
    if closure is not None:
        return "a closure"
    if not wrapper.train_mode:
        return "the optimizer is not in train mode"
    if wrapper.weight_decay_at_y != 0:
        return "weight decay at y"
    base = wrapper.base
    if "step" in vars(base) or base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks:
        return "hooks on the optimizer's step"
    for group in wrapper.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                why = _not_plain(p, p.grad, wrapper.state[p].get("z", p))
                if why:
                    return why
    return None


def _not_plain(*tensors: torch.Tensor) -> str | None:
    for tensor in tensors:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return f"a tensor of type {type(tensor).__name__}"
        if tensor.device.type != "cpu":
            return "not on a CPU, whose caches this is about"
        if tensor.layout != torch.strided or not tensor.is_contiguous():
            return "a weight or gradient that is not contiguous"
    return None
