"""Running a model with one layer's output replaced, such as by an SAE's reconstruction."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sae_kernels.errors import ModelError
from sae_kernels.harvest.model import input_device, layer_output, resolve_layer
from sae_kernels.harvest.tokens import TokenBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping


@contextmanager
def splice(
    model: nn.Module,
    layer: str,
    replace: Callable[[Tensor], Tensor],
    positions: Tensor | None = None,
    max_norm: float | None = None,
) -> Iterator[None]:
    """Within the block, the layer's output is replaced by ``replace`` of it.

    If the output is a tuple, its first element is. Gradients flow through the replacement, and
    through the original at other positions.

    Args:
        model: any model.
        layer: the dotted path of a module whose output, or its first element, is [B, S, D].
        replace: maps the activations at the replaced positions, [n, D], to the same shape; the
            result is converted to the dtype of the original.
        positions: bool [B, S], where to replace; None replaces everywhere. Activations elsewhere
            keep their bits.
        max_norm: activations of a larger norm keep their bits, too.

    Raises:
        ModelError: an unknown layer, or one with another output.
        ValueError: ``replace`` returns another shape.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Identity(), nn.Flatten())
        >>> with splice(model, "0", torch.zeros_like, torch.tensor([[True, False]])):
        ...     model(torch.ones(1, 2, 2)).tolist()
        [[0.0, 0.0, 1.0, 1.0]]
    """

    def hook(_module: nn.Module, _inputs: object, output: Any) -> Any:
        x = _activations(output, layer, positions)
        where = positions
        if max_norm is not None:
            small = ~(torch.linalg.vector_norm(x.float(), dim=-1) > max_norm)  # NaN is replaced
            where = small if where is None else small & where.to(x.device)
        spliced = _replaced(x, replace, where)
        return (spliced, *output[1:]) if isinstance(output, tuple) else spliced

    handle = resolve_layer(model, layer).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _activations(output: Any, layer: str, positions: Tensor | None) -> Tensor:
    x = output[0] if isinstance(output, tuple) else output
    shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
    expected = "B, S" if positions is None else ", ".join(map(str, positions.shape))
    fits = isinstance(x, Tensor) and x.ndim == 3
    if not fits or (positions is not None and x.shape[:2] != positions.shape):
        raise ModelError(
            f"{layer}: expected a layer that puts out [{expected}, D], got {shape}; choose a "
            "whole block of the model"
        )
    result: Tensor = x
    return result


def _replaced(x: Tensor, replace: Callable[[Tensor], Tensor], positions: Tensor | None) -> Tensor:
    rows = x.flatten(0, 1) if positions is None else x[positions.to(x.device)]
    replacement = replace(rows)
    if replacement.shape != rows.shape:
        raise ValueError(
            f"expected a replacement {list(rows.shape)}, as the activations, got "
            f"{list(replacement.shape)}"
        )
    replacement = replacement.to(x.dtype)
    if positions is None:
        return replacement.reshape(x.shape)
    where = positions.to(x.device)[..., None].expand_as(x)
    return x.masked_scatter(where, replacement)


def clean_logits(model: nn.Module, batch: TokenBatch) -> Tensor:
    """The logits [B, S, V] of a causal model.

    Raises:
        ModelError: a model without logits.
    """
    mask = batch.attention_mask.long()
    logits = getattr(model(input_ids=batch.input_ids, attention_mask=mask), "logits", None)
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"expected a model with a language-model head, {type(model).__name__} puts out no "
            "logits; load it with load_causal_model"
        )
    return logits


def spliced_logits(
    model: nn.Module,
    batch: TokenBatch,
    layer: str,
    replace: Callable[[Tensor], Tensor],
    *,
    max_norm: float | None = None,
) -> Tensor:
    """The logits [B, S, V] with a layer's output replaced at the positions of the batch.

    See :func:`splice`. Positions that an SAE was not trained on had better keep the model's own
    activation: in many models that of a sequence's first token is far larger than any other.

    Raises:
        ModelError: as :func:`splice` and :func:`clean_logits`; a layer that does not run.
    """
    ran = False

    def replace_and_note(rows: Tensor) -> Tensor:
        nonlocal ran
        ran = True
        return replace(rows) if len(rows) else rows

    with splice(model, layer, replace_and_note, batch.replaced, max_norm):
        logits = clean_logits(model, batch)
    if not ran:
        raise ModelError(f"{layer}: expected a layer that runs, it did not; choose a whole block")
    return logits


def replaced_rows(
    model: nn.Module, batches: Iterable[TokenBatch | Tensor | Mapping[str, Tensor]], layer: str
) -> Iterator[Tensor]:
    """Yields a layer's output [n, D] at the positions to replace of each batch.

    Raises:
        ModelError: no such layer, or one without an output [B, S, D].
    """
    module, device = resolve_layer(model, layer), input_device(model)
    for inputs in batches:
        batch = TokenBatch.of(inputs).to(device)
        mask = batch.attention_mask.long()
        with frozen(model), torch.no_grad():
            x = layer_output(model, module, input_ids=batch.input_ids, attention_mask=mask)
        yield _activations(x, layer, batch.replaced)[batch.replaced.to(x.device)]


def apply_sae(sae: Callable[[Tensor], Any], x: Tensor, layer: str) -> Any:
    """Runs an SAE on activations [n, D] of a layer, which must fit it; returns its ``SAEOutput``.

    Raises:
        ValueError: see :func:`check_fits`.
    """
    check_fits(sae, x.shape[-1], layer)
    return sae(x)


def check_fits(sae: object, width: int, layer: str) -> None:
    """Raises ValueError for an SAE that cannot reconstruct a layer of this width.

    These are transcoders, crosscoders and SAEs of another width.
    """
    config = getattr(sae, "config", None)
    if getattr(config, "transcodes", False):
        raise ValueError(f"{layer}: expected an SAE that reconstructs it, got a transcoder")
    n_layers = getattr(config, "n_layers", 1)
    if n_layers > 1:
        raise ValueError(
            f"{layer}: expected an SAE of this layer alone, got a crosscoder of {n_layers}"
        )
    reads = getattr(config, "input_width", width)
    if reads != width:
        raise ValueError(
            f"{layer}: expected a layer as wide as what the SAE reads, {reads}, got {width}; name "
            "the layer that it was trained on"
        )


@contextmanager
def record(model: nn.Module, layers: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """Yields a dict to which a forward pass in the block adds the outputs [B, S, D] of layers."""
    outputs: dict[str, Tensor] = {}
    handles = []

    def keep(layer: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: Any) -> None:
            outputs[layer] = _activations(output, layer, None)

        return hook

    try:
        for layer in layers:
            handles.append(resolve_layer(model, layer).register_forward_hook(keep(layer)))
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without parameter gradients in the block; both are restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, needs in trained.items():
            parameter.requires_grad_(needs)
