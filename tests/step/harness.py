"""What the tests of the training steps share: data, variants, and looking into a step."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from sae_kernels.nn import TopKConfig, TopKSAE
from sae_kernels.primitives.select_topk import cpu, reference
from sae_kernels.step import AutogradStep, FusedStep
from tests.settings import settings

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    from sae_kernels.config import TrainConfig
    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.step import StepResult

D, F, K, B = 32, 256, 8, 64
Route = TypeVar("Route", FusedStep, AutogradStep)
ROUTES = {"fused": FusedStep, "autograd": AutogradStep}
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def tokens(n: int, seed: int = 0, d_in: int = D, n_features: int = 96) -> Tensor:
    """Activations an SAE can learn: a few of many directions, with noise and a mean."""
    g = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(1234)
    directions = torch.nn.functional.normalize(torch.randn(n_features, d_in, generator=fixed))
    active = torch.rand(n, n_features, generator=g) < 5 / n_features
    strength = active * (0.5 + torch.rand(n, n_features, generator=g))
    noise = 0.05 * torch.randn(n, d_in, generator=g)
    return strength @ directions + noise + 0.3 * torch.randn(d_in, generator=fixed)


@dataclasses.dataclass(frozen=True)
class Variant:
    """Settings of the SAE and the training, how many latents start dead, and the run's length.

    Options that interact run for 200 steps; the rest is seen in fewer.
    """

    sae: dict[str, Any] = dataclasses.field(default_factory=dict)
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    n_dead: int = 0
    other_backend: str | None = None
    steps: int = 200

    def settings(self) -> tuple[TopKConfig, TrainConfig]:
        """The configurations."""
        sae = TopKConfig(**{"d_in": D, "n_latents": F, "k": K} | self.sae)
        plain = {"compute": "float32", "dead_after_tokens": 10**6}
        train = settings(sae, **(plain | self.train))
        return sae, train


VARIANTS = {
    "default": Variant(),
    "many-dead": Variant(train={"auxk_latents": 100, "auxk_alpha": 0.5}, n_dead=180),
    "bf16-everything": Variant(
        {"rank_by_decoder_norm": True, "activation_scale": 0.4},
        {"compute": "bfloat16", "multi_topk": True, "clip_norm": 0.1, "auxk_alpha": 0.5},
        n_dead=40,
    ),
    "clip-k-annealing": Variant(
        train={"clip_norm": 0.05, "k_start": 200, "k_anneal_steps": 40}, steps=50
    ),
    "bf16": Variant(train={"compute": "bfloat16"}, steps=50),
    "multi-topk": Variant(train={"multi_topk": True}, steps=50),
    "mse-without-relu": Variant({"relu": "none"}, {"loss": "mse"}, steps=50),
    "rank-by-norm": Variant({"rank_by_decoder_norm": True, "unit_norm_decoder": False}, steps=50),
    "raw-input-scaled": Variant({"subtract_b_dec": False, "activation_scale": 2.7}, steps=50),
    "few-dead": Variant(n_dead=6, steps=50),
    "reference-backend": Variant(other_backend="reference", steps=50),
}


def stepping(route: type[Route], sae: SparseAutoencoder, config: TrainConfig) -> Route:
    """A route's step with these settings."""
    return route(sae, config.objective, config.optimizer, steps=config.steps, seed=config.seed)


def build(variant: Variant, route: type[Route] = FusedStep) -> Route:
    """A route somewhere in the middle of things; every call gives the same start."""
    sae_config, train_config = variant.settings()
    sae = TopKSAE(sae_config)
    g = torch.Generator().manual_seed(1)
    dead = torch.randperm(F, generator=g)[: variant.n_dead]
    with torch.no_grad():
        sae.b_enc.copy_(0.05 * torch.randn(F, generator=g))
        sae.b_dec.copy_(0.1 * torch.randn(D, generator=g))
        if not sae_config.unit_norm_decoder:
            sae.W_dec.mul_(0.7 + torch.rand(F, 1, generator=g))
        # Positive now and then but never among the largest: dead to the main selection only.
        sae.W_enc[dead] *= 0.02
        sae.b_enc[dead] = 0.0
    if route is AutogradStep:
        sae.backend = variant.other_backend
    step = stepping(route, sae, train_config)
    step.dead.since_fired[dead] = 10**6 + torch.arange(dead.numel()) % 50 * B
    return step


class State(NamedTuple):
    """Everything a step reads and changes, in copies; matrices as [rows, width]."""

    weights: dict[str, Tensor]
    moments: dict[str, tuple[Tensor, Tensor]]
    since_fired: Tensor
    n_updates: Tensor


def state(route: FusedStep | AutogradStep) -> State:
    """The state of either route, in the shapes of the parameters."""
    weights = {name: p.detach().clone() for name, p in route.sae.named_parameters()}
    moments = {}
    for name, p in route.sae.named_parameters():
        if isinstance(route, FusedStep):
            pair = route.matrices[name].m, route.matrices[name].v
        else:
            adam = route.torch_adam.state[p]
            pair = adam["exp_avg"], adam["exp_avg_sq"]
        moments[name] = pair[0].reshape(p.shape).clone(), pair[1].reshape(p.shape).clone()
    return State(weights, moments, route.dead.since_fired.clone(), route.n_updates.clone())


def everything(step: FusedStep | AutogradStep) -> dict[str, Tensor]:
    """All that training changes, in copies."""
    now = state(step)
    held = {f"weights of {n}": t for n, t in now.weights.items()}
    held |= {
        f"{kind} of {n}": t for n, p in now.moments.items() for kind, t in zip("mv", p, strict=True)
    }
    held |= {"since fired": now.since_fired, "updates": now.n_updates}
    held |= {f"buffer {n}": t.clone() for n, t in step.sae.state_dict().items()}
    if isinstance(step, FusedStep):
        copies = {f"copy of {n}": row.copy for n, row in step.matrices.items()}
        held |= {n: t.clone() for n, t in copies.items() if t is not None}
    return {name: t.reshape(-1) for name, t in held.items()}


def load(route: AutogradStep, source: State) -> None:
    """Puts the composable route into this state."""
    for name, p in route.sae.named_parameters():
        p.data.copy_(source.weights[name])
        m, v = source.moments[name]
        route.torch_adam.state[p] = {
            "step": source.n_updates.float(),
            "exp_avg": m.clone(),
            "exp_avg_sq": v.clone(),
        }
    route.dead.since_fired = source.since_fired.clone()
    route.n_updates = source.n_updates.clone()


class Seen(NamedTuple):
    """What a step selected, by the kernel's own word: (values, indices), main and AuxK."""

    main: tuple[Tensor, Tensor]
    aux: tuple[Tensor, Tensor] | None
    result: StepResult


def watched(
    monkeypatch: pytest.MonkeyPatch,
    route: FusedStep | AutogradStep,
    x: Tensor,
    **arguments: Any,
) -> Seen:
    """Runs a step and records what select_topk returned."""
    calls: list[tuple[Tensor, Tensor]] = []

    def recorded(real: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Any]:
        def run(*args: Any) -> tuple[Tensor, Tensor]:
            values, indices = real(*args)
            calls.append((values.clone(), indices.clone()))  # the route works on values in place
            return values, indices

        return run

    with monkeypatch.context() as patch:
        for module in (cpu, reference):
            patch.setattr(module, "run", recorded(module.run))
        result = route(x, **arguments)
    assert len(calls) in (1, 2)
    return Seen(calls[0], calls[1] if len(calls) == 2 else None, result)


def counted(step: FusedStep | AutogradStep, **arguments: Any) -> tuple[StepResult, Tensor]:
    """A step, and how often each latent fired by its own count."""
    counts: list[Tensor] = []
    update = step.dead.update

    def recorded(fired: Tensor, *others: Any, **named: Any) -> None:
        counts.append(fired.clone())
        update(fired, *others, **named)

    step.dead.update = recorded  # type: ignore[method-assign]
    result = step(**arguments)
    del step.dead.update
    return result, counts[0]
