"""Dense training steps in plain torch, the baselines of FusedStep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.testing.dense_selection import jumprelu, step

if TYPE_CHECKING:
    from collections.abc import Callable


class DenseStep:
    """A dense TopK training step: encode, topk, scatter, dense decode, autograd, Adam.

    Unit-norm decoder with the parallel gradient removed, as FusedStep does it, so that both do the
    same work.

    Args:
        W_enc, W_dec: [F, D] initial weights (copied).
        k: latents kept per token.
        optimizer: variant of torch's Adam: "foreach", "fused" or "default".
        autocast: bf16 autocast around the forward pass.
        compiler: torch.compile backend for the forward and backward pass; None: not compiled.
    """

    def __init__(
        self,
        W_enc: torch.Tensor,
        W_dec: torch.Tensor,
        k: int,
        optimizer: str,
        autocast: bool,
        compiler: str | None = None,
    ) -> None:
        self.k, self.autocast = k, autocast
        n_latents, d_in = W_enc.shape
        self.W_enc = W_enc.clone().requires_grad_()
        self.W_dec = W_dec.clone().requires_grad_()
        self.b_enc = W_enc.new_zeros(n_latents).requires_grad_()
        self.b_dec = W_enc.new_zeros(d_in).requires_grad_()
        self.parameters = [self.W_enc, self.W_dec, self.b_enc, self.b_dec]
        kind: dict[str, Any] = {} if optimizer == "default" else {optimizer: True}
        self.optimizer = torch.optim.Adam(self.parameters, lr=1e-4, **kind)

        def built(part: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(part, backend=compiler) if compiler else part

        self._loss = built(self._dense_loss)
        self._constrain_gradient = built(self._without_parallel_part)
        self._constrain_decoder = built(self._unit_norm)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """One step on [B, D]; returns the loss."""
        loss: torch.Tensor = self._loss(x)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            self._constrain_gradient()
            self.optimizer.step()
            self._constrain_decoder()
        return loss.detach()

    def codes(self, h: torch.Tensor) -> torch.Tensor:
        """Codes [B, F] of pre-activations [B, F]."""
        values, indices = h.relu().topk(self.k, dim=1, sorted=False)
        return torch.zeros_like(h).scatter(1, indices, values)

    def _dense_loss(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            h = torch.nn.functional.linear(x - self.b_dec, self.W_enc, self.b_enc)
            codes = self.codes(h)
            x_hat = codes @ self.W_dec + self.b_dec
            penalty = self._penalty(h, codes)
        return (x_hat.float() - x).square().sum() / (x - x.mean(0)).square().sum() + penalty

    def _penalty(self, _h: torch.Tensor, _codes: torch.Tensor) -> torch.Tensor | float:
        return 0.0

    def _without_parallel_part(self) -> None:
        grad = self.W_dec.grad
        assert grad is not None
        grad.addcmul_((grad * self.W_dec).sum(1, keepdim=True), self.W_dec, value=-1)

    def _unit_norm(self) -> None:
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))


class DenseBatchTopKStep(DenseStep):
    """A dense BatchTopK training step: the k B largest codes of the batch."""

    def codes(self, h: torch.Tensor) -> torch.Tensor:
        """Codes [B, F]: the k B largest of the batch."""
        flat = h.relu().flatten()
        values, places = flat.topk(self.k * h.shape[0], sorted=False)
        return torch.zeros_like(flat).scatter(0, places, values).view_as(h)


class DenseReLUStep(DenseStep):
    """A dense ReLU training step with an L1 penalty."""

    coefficient = 1e-3

    def codes(self, h: torch.Tensor) -> torch.Tensor:
        """Codes [B, F]: all positive pre-activations."""
        return h.relu()

    def _penalty(self, _h: torch.Tensor, codes: torch.Tensor) -> torch.Tensor | float:
        return self.coefficient * codes.float().sum() / codes.shape[0]


class DenseJumpReLUStep(DenseStep):
    """A dense JumpReLU training step with the rectangle estimator and an L0 penalty.

    Args:
        threshold, bandwidth: of the estimator; the logarithms of the thresholds are trained.
        others: as of :class:`DenseStep`.
    """

    coefficient = 1e-3

    def __init__(self, *others: Any, threshold: float, bandwidth: float, **options: Any) -> None:
        super().__init__(*others, **options)
        self.bandwidth = bandwidth
        start = torch.full_like(self.b_enc, threshold).log()
        self.log_threshold = start.detach().requires_grad_()
        self.optimizer.add_param_group({"params": [self.log_threshold]})

    def codes(self, h: torch.Tensor) -> torch.Tensor:
        """Codes [B, F]: pre-activations above their threshold."""
        return jumprelu(h, self.log_threshold.exp(), self.bandwidth)

    def _penalty(self, h: torch.Tensor, codes: torch.Tensor) -> torch.Tensor | float:
        fires = step(h, self.log_threshold.exp(), self.bandwidth)
        return self.coefficient * fires.float().sum() / codes.shape[0]


class DenseSwitchStep(DenseStep):
    """amudide/switch_sae's step: all experts are multiplied, and all but one then with 0.

    ``f = relu(W_enc (x - b_dec))`` times the gate of the token's expert, 0 for the others' latents;
    the k largest of all F; ``mean |x_hat - x|^2 + balance_coefficient D E sum_i F_i P_i`` with the
    router run a second time; gradients clipped, to norm 1 there, before the decoder's parallel part
    is removed. The encoder has no bias: b_enc stays 0.

    Args:
        W_router: [E, D] (copied).
        balance_coefficient: its lb_alpha.
        clip_norm: of all gradients together; None clips nothing.
        others: as of :class:`DenseStep`.
    """

    def __init__(
        self,
        *others: Any,
        W_router: torch.Tensor,
        balance_coefficient: float,
        clip_norm: float | None = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(*others, **options)
        self.clip_norm, self.balance_coefficient = clip_norm, balance_coefficient
        self.W_router = W_router.clone().requires_grad_()
        self.b_router = torch.zeros_like(self.b_dec).requires_grad_()
        router = [self.W_router, self.b_router]
        self.parameters += router
        self.optimizer.add_param_group({"params": router})

    def codes(self, h: torch.Tensor) -> torch.Tensor:
        """Codes [B, F]: the k largest of what the gates leave."""
        values, indices = h.topk(self.k, dim=1, sorted=False)
        return torch.zeros_like(h).scatter(1, indices, values)

    def _dense_loss(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            z = torch.nn.functional.linear(x - self.b_dec, self.W_enc).relu()
            codes = self.codes(z * self._gates(self._probabilities(x)))
            x_hat = codes @ self.W_dec + self.b_dec
            balance = self._load_balance(self._probabilities(x))
        error = (x_hat.to(x.dtype) - x).square().sum(1).mean()
        return error + self.balance_coefficient * x.shape[1] * balance

    def _probabilities(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x - self.b_router, self.W_router).softmax(1)

    def _gates(self, p: torch.Tensor) -> torch.Tensor:
        n_experts, n_latents = p.shape[1], self.W_enc.shape[0]
        chosen = torch.nn.functional.one_hot(p.argmax(1), n_experts)
        return (chosen * p).repeat_interleave(n_latents // n_experts, 1)

    def _load_balance(self, p: torch.Tensor) -> torch.Tensor:
        n_experts = p.shape[1]
        load = torch.nn.functional.one_hot(p.argmax(1), n_experts).to(p.dtype).mean(0)
        return n_experts * (load * p.mean(0)).sum()

    def _without_parallel_part(self) -> None:
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        super()._without_parallel_part()
