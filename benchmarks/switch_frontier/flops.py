"""What a training step multiplies and adds, counted by a formula."""

from __future__ import annotations

ADAM = 12
"""Operations a weight: 3 for the first moment, 4 for the second, 5 for the update itself."""


def step_flops(batch_size: int, d_in: int, n_latents: int, n_experts: int, k: int) -> int:
    """FLOPs of a training step of a TopK SAE (one expert) or a Switch SAE.

    With B tokens, width D, F latents, E experts and k kept: the encoder's product 2 B D F/E; for
    E > 1 the router's and its gradient, 2 B D E each; decoding, the gradient of the codes and those
    of both matrices, 2 B k D each; dense Adam 12 for each of the (2 F + E) D weights. Biases, ReLU,
    softmax, selection and norms are left out, and so is AuxK, which is off.

    Args:
        batch_size: B.
        d_in: D.
        n_latents: F, of all experts together.
        n_experts: E; 1 is TopK, which has no router.
        k: latents kept per token.

    Example:
        >>> topk = step_flops(1024, 384, 3072, 1, 32)
        >>> topk == 2 * 1024 * 384 * 3072 + 8 * 1024 * 32 * 384 + 12 * 2 * 3072 * 384
        True
        >>> round(step_flops(1024, 384, 3072, 8, 32) / topk, 2)  # equal width
        0.17
        >>> round(step_flops(1024, 384, 8 * 3072, 8, 32) / topk, 2)  # an expert as wide as TopK
        1.08
    """
    encoder = 2 * batch_size * d_in * n_latents // n_experts
    router = 4 * batch_size * d_in * n_experts if n_experts > 1 else 0
    sparse = 4 * 2 * batch_size * k * d_in
    weights = (2 * n_latents + (n_experts if n_experts > 1 else 0)) * d_in
    return encoder + router + sparse + ADAM * weights
