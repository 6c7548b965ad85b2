"""Writing the folder of amudide/switch_sae, dictionary_learning's fork: ``ae.pt`` and settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.formats.dictionary_learning import CONFIG_FILE, METADATA, SWITCH, WEIGHTS_FILE
from sae_kernels.formats.layout import only_raw_activations, to_foreign
from sae_kernels.io.files import json_writer, publish_all
from sae_kernels.nn import SwitchConfig

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sae_kernels.io.tensor_files import Tensors
    from sae_kernels.nn import SAEConfig


def write_dictionary_learning(
    folder: str | Path,
    config: SAEConfig,
    tensors: Tensors,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes a Switch SAE as a SwitchAutoEncoder of amudide/switch_sae, complete or not at all.

    ``ae.pt`` is a state dict, with encoder.weight [F, D], router.weight [E, D], decoder [F, D],
    b_dec and b_router [D]. There is no encoder bias, so that of the SAE must be zeros.

    Args:
        folder: made when missing; its two files are replaced.
        config, tensors: the SAE, by our names, as `Weights` has them.
        metadata: model_name, layer and submodule_name, where they are known.

    Raises:
        ValueError, TypeError: an SAE that the class cannot hold; the message says why. Metadata
            that JSON lacks.
        DataError: tensors that are not what the configuration says.

    Example:
        >>> import tempfile
        >>> from sae_kernels.formats import read
        >>> config = SwitchConfig(2, 8, k=1, n_experts=4, encoder_bias=False)
        >>> tensors = {name: torch.zeros(size) for name, size in config.shapes().items()}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_dictionary_learning(folder, config, tensors)
        ...     read(folder).config == config
        True
    """
    only_raw_activations("dictionary_learning", config)
    values = _values(config, metadata or {})
    theirs = to_foreign("tensors", config, SWITCH, tensors)
    if (largest := float(tensors["b_enc"].abs().max())) > 0:
        raise ValueError(
            f"dictionary_learning: expected b_enc of zeros, got numbers up to {largest:.3g}: "
            "SwitchAutoEncoder has no encoder bias; train with encoder_bias false, or write the "
            "native format"
        )
    publish_all(
        folder,
        {
            WEIGHTS_FILE: lambda path: _save(theirs, path),
            CONFIG_FILE: json_writer({"trainer": values}),
        },
    )


def _save(tensors: Tensors, path: Path) -> None:
    # Views of one storage would be written as such, and a name would become part of the file.
    with path.open("wb") as file:
        torch.save({name: tensor.clone() for name, tensor in tensors.items()}, file)


def _values(config: SAEConfig, metadata: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(config, SwitchConfig):
        raise ValueError(
            f"dictionary_learning: expected a Switch SAE, got {type(config).__name__}: of its "
            "classes only SwitchAutoEncoder is written"
        )
    for fits, expected in (
        (not config.transcodes, "an SAE, got a transcoder: SwitchAutoEncoder reads and writes one"),
        (
            config.subtract_b_dec,
            "subtract_b_dec true, got false: SwitchAutoEncoder subtracts b_dec from its input",
        ),
        (
            not config.shared_expert,
            "shared_expert false, got true: SwitchAutoEncoder sends a token to one expert",
        ),
    ):
        if not fits:
            raise ValueError(f"dictionary_learning: expected {expected}")
    return {
        "trainer_class": "SwitchTrainer",
        "dict_class": "SwitchAutoEncoder",
        "activation_dim": config.d_in,
        "dict_size": config.n_latents,
        "k": config.k,
        "experts": config.n_experts,
        "heaviside": config.gate == "heaviside",
        **{theirs: metadata[ours] for theirs, ours in METADATA.items() if ours in metadata},
    }
