"""SAELens' covariance whitening, which its training runs keep beside an SAE."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from sae_kernels.errors import DataError
from sae_kernels.formats.layout import check, weight_dtype
from sae_kernels.io.tensor_files import read_safetensors
from sae_kernels.nn import BatchTopKConfig, GatedConfig, TopKConfig

if TYPE_CHECKING:
    from pathlib import Path

    from sae_kernels.io.tensor_files import Tensors
    from sae_kernels.nn import SAEConfig

WHITENING_FILE = "activation_whitening.safetensors"
_INVERSE = 1e-2  # largest entry of inverse * matrix - 1; in fp64 SAELens' own have some 1e-11


def fold_whitening(path: Path, config: SAEConfig, tensors: Tensors) -> SAEConfig:
    """Makes an SAE of whitened activations one of raw activations, in place; the same function.

    The SAE reads ``z = (x - mean) M``, and ``x_hat = z_hat M^-1 + mean`` (SAELens'
    ActivationScaler and ``fold_activation_whitening``). Where latents are ranked by the norms of
    the decoder's rows, which change, the norms are multiplied into the encoder first, as SAELens
    does: codes are then SAELens'.

    Args:
        path: the file with mean [D], matrix and inverse_matrix [D, D].
        config, tensors: of the SAE; the tensors are replaced. Computed in fp64, rounded once.

    Returns:
        The configuration of the folded SAE.

    Raises:
        DataError: no such file, tensors that are not what they should be, a transcoder, an
            encoder that is the decoder.
    """
    if config.transcodes or "W_enc" not in tensors:
        raise DataError(
            f"{path}: expected no whitening of a transcoder's or a matching pursuit SAE's "
            "activations, which SAELens lacks"
        )
    if not path.is_file():
        raise DataError(
            f"{path}: expected the whitening that the SAE's activations go through, it is not "
            "there; finish its training in SAELens, which folds it, and save it again"
        )
    d = config.d_in
    found = read_safetensors(path)
    check(path, {"mean": (d,), "matrix": (d, d), "inverse_matrix": (d, d)}, found)
    mean, matrix, inverse = (found[n].double() for n in ("mean", "matrix", "inverse_matrix"))
    off = float((inverse @ matrix - torch.eye(d, dtype=torch.float64)).abs().max())
    if not off <= _INVERSE:
        raise DataError(
            f"{path}: inverse_matrix: expected the inverse of matrix, their product is off by "
            f"{off:.3g}"
        )
    dtype = weight_dtype(tensors)
    wide = {name: tensors[name].double() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if isinstance(config, TopKConfig | BatchTopKConfig) and config.rank_by_decoder_norm:
        norms = wide["W_dec"].norm(dim=1).clamp(min=1e-8)  # as SAELens' get_W_dec_norm
        wide["W_enc"] *= norms[:, None]
        wide["b_enc"] *= norms
        wide["W_dec"] /= norms[:, None]
        config = dataclasses.replace(config, rank_by_decoder_norm=False)
    wide["W_enc"] = wide["W_enc"] @ matrix.T
    if not config.subtract_b_dec:  # otherwise the folded b_dec takes the mean from the input
        shift = wide["W_enc"] @ mean
        wide["b_enc"] -= shift
        if isinstance(config, GatedConfig):
            wide["b_mag"] = tensors["b_mag"].double() - shift * tensors["r_mag"].double().exp()
    wide["W_dec"] = wide["W_dec"] @ inverse
    wide["b_dec"] = wide["b_dec"] @ inverse + mean
    tensors |= {name: tensor.to(dtype).contiguous() for name, tensor in wide.items()}
    return config
