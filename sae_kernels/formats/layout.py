"""Another tool's tensors as ours, and ours as another tool's."""

from __future__ import annotations

import functools
import math
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sae_kernels.errors import DataError
from sae_kernels.io.tensor_files import check_integers
from sae_kernels.nn.pretrained import is_sound
from sae_kernels.primitives.checks import OPERAND_DTYPES
from sae_kernels.primitives.tensors import rounded_down

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from sae_kernels.config.sae import SAEConfig
    from sae_kernels.io.tensor_files import Sizes, Stored, Tensors

_THRESHOLDS = ("threshold", "log_threshold")


class Weights(NamedTuple):
    """An SAE read from any tool's files: configuration, tensors and metadata.

    Attributes:
        config: what it is.
        tensors: by our names, latents first, in the dtype of the file: W_enc [F, D_in],
            b_enc [F], W_dec [F, D_out], b_dec [D_out] and what the architecture adds.
        metadata: what the files say of the model and the layer, as plain JSON values.
    """

    config: SAEConfig
    tensors: Tensors
    metadata: dict[str, Any]


def weight_dtype(tensors: Mapping[str, torch.Tensor]) -> torch.dtype:
    """The dtype that holds every weight exactly; thresholds have one of their own."""
    dtypes = [t.dtype for name, t in tensors.items() if name not in _THRESHOLDS]
    return functools.reduce(torch.promote_types, dtypes)


def load(
    stored: Stored,
    config: SAEConfig,
    names: Mapping[str, str],
    others: Mapping[str, int] = MappingProxyType({}),
) -> Tensors:
    """A file's tensors, read once what it says of them is what the configuration says.

    Args:
        stored: the file.
        config: what it claims to be.
        names: theirs by ours, as in `from_foreign`.
        others: what may lie beside them, and how many numbers it may have.

    Raises:
        DataError: tensors that are missing, unknown or of another shape, before any is read.
    """
    sizes = {name: size for name, size in stored.sizes.items() if name not in others}
    check_sizes(stored.path, _theirs(config, names), sizes)
    for name, most in others.items():
        size = stored.sizes.get(name, ())
        if len(size) > 1 or math.prod(size) > most:
            raise DataError(
                f"{stored.path}: {name}: expected at most {most} numbers in a row, got {list(size)}"
            )
    return stored.load()


def from_foreign(
    path: Path, config: SAEConfig, names: Mapping[str, str], found: Tensors
) -> Tensors:
    """Our tensors out of another tool's.

    Weights get one dtype, the widest among them; thresholds of latents are fp32 and the single
    threshold of BatchTopK fp64, whatever the weights are.

    Args:
        path: where they come from, for the messages.
        config: what the file claims to be.
        names: theirs by ours; one that ends in ``.T`` lies transposed in the file, and one that is
            empty has no place there: it is all zeros.
        found: what is in the file; emptied on the way.

    Raises:
        DataError: tensors that are missing, unknown, of another shape, not of floating point or
            not finite.
    """
    check(path, _theirs(config, names), found)
    ours = {our: _taken(names[our], size, found) for our, size in config.shapes().items()}
    dtype = weight_dtype(ours)
    for name, tensor in ours.items():
        if name not in _THRESHOLDS:
            ours[name] = tensor.to(dtype).contiguous()
        elif name == "log_threshold":
            ours[name] = tensor.float()
        else:
            ours[name] = rounded_down(tensor.double()) if tensor.ndim else tensor.double()
    return ours


def to_foreign(
    where: str, config: SAEConfig, names: Mapping[str, str], tensors: Tensors
) -> Tensors:
    """Another tool's tensors out of ours, on the CPU; undoes `from_foreign`.

    What has no place there is left out: the caller looks whether it is zeros.

    Raises:
        DataError: as `from_foreign`.
    """
    check(where, config.shapes(), tensors)
    dtype = weight_dtype(tensors)
    theirs = {}
    for our, name in names.items():
        if not name:
            continue
        tensor = tensors[our].detach().cpu()
        own = tensor.dtype if our in _THRESHOLDS else dtype
        theirs[_plain(name)] = _turned(name, tensor).to(own).contiguous()
    return theirs


def check(where: object, expected: Mapping[str, tuple[int, ...]], found: Tensors) -> None:
    """Compares names, shapes, dtypes and values.

    Numbers must be finite, but for the threshold of a latent, which +inf silences.

    Raises:
        DataError: names the tensor, what was expected and what came.
    """
    check_sizes(where, expected, {name: tuple(tensor.shape) for name, tensor in found.items()})
    for name, tensor in found.items():
        check_dtype(where, name, tensor)
        if not is_sound(name, tensor):
            raise DataError(
                f"{where}: {name}: expected finite numbers, got NaN or infinity; use an earlier "
                "checkpoint"
            )


def check_dtype(where: object, name: str, tensor: torch.Tensor) -> None:
    """Raises DataError for a tensor of a dtype that weights do not have."""
    if tensor.dtype not in OPERAND_DTYPES:
        known = ", ".join(str(dtype) for dtype in OPERAND_DTYPES)
        raise DataError(f"{where}: {name}: expected one of {known}, got {tensor.dtype}")


def check_sizes(where: object, expected: Mapping[str, tuple[int, ...]], sizes: Sizes) -> None:
    """Raises DataError unless a file has exactly the tensors that are expected, by their shapes."""
    for name, size in expected.items():
        if name not in sizes:
            raise DataError(f"{where}: expected a tensor {name} {list(size)}, got {listed(sizes)}")
        if sizes[name] != size:
            raise DataError(f"{where}: {name}: expected {list(size)}, got {list(sizes[name])}")
    for name in sizes:
        if name not in expected:
            raise DataError(
                f"{where}: expected no tensors but {', '.join(expected)}, got {name!r:.80} too"
            )


def listed(names: Iterable[str]) -> str:
    """Names of a stranger's tensors on one line."""
    shown = [name if name.isprintable() else repr(name) for name in sorted(names)]
    return f"{', '.join(shown) or 'nothing':.300}"


def configure(
    path: Path, make: Callable[..., SAEConfig], *arguments: Any, **values: Any
) -> SAEConfig:
    """A configuration from what a file says; nothing is allocated.

    Raises:
        DataError: what the configuration refuses, with the file's name.
    """
    check_integers(path, values)
    try:
        return make(*arguments, **values)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: {error!s:.500}") from error


def at_least_zero(thresholds: torch.Tensor) -> torch.Tensor:
    """Thresholds for ``h 1[h > t]`` out of those of ``relu(h) 1[h > t]``: the same codes.

    Below 0 the ReLU decides, which is a threshold of 0.
    """
    return thresholds.clamp(min=0)


def only_raw_activations(tool: str, config: SAEConfig) -> None:
    """Refuses what no other tool's file can say: layers side by side, and a scale.

    Raises:
        ValueError: with what to do.
    """
    if config.n_layers != 1:
        raise ValueError(
            f"{tool}: expected n_layers 1, got {config.n_layers}; its format has no crosscoders"
        )
    for name in ("activation_scale", "target_scale"):
        if (scale := getattr(config, name)) != 1:
            raise ValueError(
                f"{tool}: expected {name} 1, got {scale}; fold it into the weights first, with "
                "sae.folded()"
            )


def _theirs(config: SAEConfig, names: Mapping[str, str]) -> Sizes:
    """Shapes of the tensors that the file must hold, by its own names."""
    sizes = ((names[our], size) for our, size in config.shapes().items())
    return {_plain(name): _turned(name, size) for name, size in sizes if name}


def _taken(name: str, size: tuple[int, ...], found: Tensors) -> torch.Tensor:
    if not name:
        return torch.zeros(size, dtype=torch.bool)  # which decides on no other's dtype
    tensor: torch.Tensor = _turned(name, found.pop(_plain(name)))
    return tensor


def _plain(name: str) -> str:
    return name.removesuffix(".T")


def _turned(name: str, what: Any) -> Any:
    """A tensor or a shape, transposed where the name says so."""
    if not name.endswith(".T"):
        return what
    return what.T if isinstance(what, torch.Tensor) else what[::-1]
