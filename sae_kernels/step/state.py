"""State that outlives a step: dead latents, the sparsity schedule, what checkpoints hold."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sae_kernels.errors import DataError
from sae_kernels.nn.objective import powers
from sae_kernels.primitives.pick_dead import pick_dead

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sae_kernels.config.objective import ObjectiveConfig

_WATCHED = 10  # steps before a change of p over which the penalty is averaged


class State(NamedTuple):
    """State of a training step or a part of it; tensors are not copied.

    Attributes:
        tensors: counters and moments by name.
        values: plain JSON values by name.
    """

    tensors: dict[str, torch.Tensor]
    values: dict[str, Any]

    def __or__(self, other: State) -> State:
        """Both parts together."""
        return State(self.tensors | other.tensors, self.values | other.values)


def restore_(mine: Mapping[str, torch.Tensor], state: State) -> None:
    """Copies saved tensors into those of the same name, in place.

    Raises:
        DataError: a tensor is missing, or has another shape or dtype.
    """
    for name, tensor in mine.items():
        tensor.copy_(matched(name, tensor, state))


def matched(name: str, like: torch.Tensor, state: State) -> torch.Tensor:
    """The saved tensor of a name, checked against the shape and dtype of ``like``.

    Raises:
        DataError: it is missing, or has another shape or dtype.
    """
    saved = state.tensors.get(name)
    came = None if saved is None else (list(saved.shape), saved.dtype)
    if saved is None or came != (list(like.shape), like.dtype):
        raise DataError(
            f"{name}: expected {list(like.shape)} in {like.dtype} in the checkpoint, got "
            f"{came or 'nothing'}; it is of another run, or of another version"
        )
    return saved


class DeadLatents:
    """Counts the tokens since each latent last fired.

    A latent fires when an entry of it is kept and ReLU did not set it to 0.

    Attributes:
        since_fired: int64 [F].
        after: tokens without firing that make a latent dead.
        padded: whether :meth:`pick` leaves its padding in: on a GPU the host must not wait for the
            number of dead latents.

    Example:
        >>> dead = DeadLatents(3, after=2)
        >>> dead.update(torch.tensor([1, 0, 0]), n_tokens=2, skip=torch.tensor(False))
        >>> dead.mask().tolist()
        [False, True, True]
    """

    def __init__(self, n_latents: int, after: int, device: torch.device | None = None) -> None:
        self.after = after
        self.since_fired = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self.padded = self.since_fired.device.type != "cpu"

    def update(self, counts: torch.Tensor, n_tokens: int, skip: torch.Tensor) -> None:
        """Adds a batch, given how often each latent fired in it, unless ``skip`` is true."""
        aged = torch.where(counts > 0, 0, self.since_fired + n_tokens)
        self.since_fired.copy_(torch.where(skip, self.since_fired, aged))  # in place: CUDA graphs

    def mask(self) -> torch.Tensor:
        """bool [F], true for dead latents."""
        return self.since_fired >= self.after

    def pick(self, at_most: int, backend: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The latents dead longest, int32 [at most at_most], ascending; and their number."""
        latents, count = pick_dead(self.since_fired, self.after, at_most, backend=backend)
        return latents if self.padded else latents[: int(count)], count

    def longest(self, at_most: int) -> torch.Tensor:
        """The latents dead longest, int64, without padding; waits for the device."""
        latents, count = self.pick(at_most)
        return latents[: int(count)].long()


class DeadRows(NamedTuple):
    """The latents that are dead longest, and what AuxK reads of them.

    Attributes:
        W_enc, b_enc, W_dec: hold their rows, at ``latents``.
        latents: int32 [A], -1 is padding.
        number: scalar, how many there are.
        own: int32 [A], the number of each in this process; -1: another has it.
    """

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor
    latents: torch.Tensor
    number: torch.Tensor
    own: torch.Tensor


class SparsitySchedule:
    """Schedule of the sparsity penalty: its coefficient and its exponent p at each step.

    The coefficient rises linearly. With "lp" p falls from 1 to ``p_end``; at each change the
    coefficient is rescaled so that the penalty keeps its mean over the last ten steps, as a smaller
    p alone would make it much larger (p-annealing of dictionary_learning; arXiv 2408.00113). With a
    ``target_l0`` (other than the penalty "target_l0") the risen coefficient is controlled: each
    step multiplies or divides it by ``1 + 10 / steps``, as L0 is above or below the target
    (noanabeshima's 3e-4 in a run of 33 000 steps).

    Args:
        config: the objective's settings.
        steps: length of the run.

    Attributes:
        step: steps made.
        p: the current exponent.
        factor: factor of the coefficient from the changes of p so far.
        control: scalar on the device, factor of the coefficient from ``target_l0``; None before.
    """

    def __init__(self, config: ObjectiveConfig, steps: int) -> None:
        self.config, self.steps = config, steps
        n = config.p_steps
        start = config.p_start * steps
        fractions = [i / (n - 1) if n > 1 else 1.0 for i in range(n)]
        times = [round(start + f * (steps - start)) for f in fractions]
        powers = [1 + (config.p_end - 1) * f for f in fractions]
        changes = dict(zip(times, powers, strict=True))  # of several at one step the last counts
        if config.sparsity != "lp":
            changes.clear()
        self.step, self.p, self.factor = 0, changes.pop(0, 1.0), 1.0
        self._changes = list(changes.items())
        self._seen: list[torch.Tensor] = []
        self.control: torch.Tensor | None = None

    def state(self) -> State:
        """All that the next step depends on."""
        tensors = {} if self.control is None else {"schedule.control": self.control}
        if self._seen:
            tensors["schedule.seen"] = torch.stack(self._seen)
        values = {"step": self.step, "p": self.p, "factor": self.factor}
        return State(tensors, {"schedule": values})

    def load_state(self, state: State) -> None:
        """Restores what :meth:`state` returned."""
        values = state.values["schedule"]
        self.step, self.p, self.factor = int(values["step"]), values["p"], values["factor"]
        self._changes = [change for change in self._changes if change[0] > self.step]
        self.control = state.tensors.get("schedule.control")
        self._seen = list(state.tensors.get("schedule.seen", ()))

    def coefficient(self) -> float | torch.Tensor:
        """The factor of the penalty at this step."""
        value = self.config.sparsity_coefficient * self._risen() * self.factor
        return value if self.control is None else value * self.control

    def _risen(self) -> float:
        warmup = self.config.sparsity_warmup_steps
        if warmup is None:  # where L0 is aimed at an SAE starts there
            warmup = 0 if self.config.target_l0 else min(2000, self.steps // 5)
        return min(1.0, (self.step + 1) / warmup) if warmup else 1.0

    def observe(self, codes: torch.Tensor) -> None:
        """Notes the codes that the "lp" penalty sums the powers of; once or in several parts."""
        if not self._changes:
            return
        time, power = self._changes[0]
        if time - _WATCHED <= self.step < time:
            codes = codes.detach()
            self._seen.append(
                torch.stack([powers(codes, p).float().sum() for p in (self.p, power)])
            )

    def advance(self, l0: torch.Tensor) -> None:
        """Moves to the next step, given the L0 of this one."""
        target = self.config.target_l0
        if target is not None and self.config.sparsity != "target_l0" and self._risen() == 1:
            self.control = torch.ones_like(l0) if self.control is None else self.control
            step = 1 + 10 / self.steps
            self.control = self.control * torch.where(l0 > target, step, 1 / step)
        self.step += 1
        if not self._changes or self.step < self._changes[0][0]:
            return
        if self._seen:
            seen = torch.stack(self._seen)
            now, then = seen[seen.isfinite().all(1)].sum(0).tolist()  # a skipped step has none
            ratio = now / then if then else 1.0
            self.factor *= ratio if 0 < ratio < math.inf else 1.0
        self.p = self._changes.pop(0)[1]
        self._seen.clear()
