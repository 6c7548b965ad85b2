"""circuit-tracer (0.5): attribution graphs of cross-layer transcoders, theirs and ours."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.formats.circuit_tracer_clt import to_cross_layer
from sae_kernels.integrations.adapters import Adapter
from sae_kernels.integrations.circuit_tracer import attribution

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sae_kernels.integrations.adapters import Installation
    from sae_kernels.nn import CrossLayer

_CLT = "circuit_tracer.transcoder.cross_layer_transcoder"
_CONTEXTS = "circuit_tracer.attribution.context_"
_MODEL = "circuit_tracer.replacement_model.replacement_model_transformerlens"


def transcoder(
    clt: CrossLayer,
    *,
    feature_input_hook: str = "hook_resid_mid",
    feature_output_hook: str = "hook_mlp_out",
    scan: str | None = None,
) -> Any:
    """One of our cross-layer transcoders as circuit-tracer's, for its replacement models.

    Encoder and decoder rows stay where they are; circuit-tracer reads the decoder's as it does from
    files. ``sk.accelerate("circuit_tracer")`` before it makes graphs of long prompts fit.

    Args:
        clt: weakly causal JumpReLU or BatchTopK, of one width.
        feature_input_hook, feature_output_hook: what a layer's latents read and write, as
            TransformerLens calls it.
        scan: circuit-tracer's name of the set.

    Returns:
        A ``circuit_tracer.transcoder.cross_layer_transcoder.CrossLayerTranscoder``.

    Raises:
        ImportError: circuit-tracer is not installed.
        ValueError: a transcoder that it cannot be.
    """
    theirs = importlib.import_module(_CLT)
    folded = clt.folded()
    config, tensors = to_cross_layer(folded.config, dict(folded.state_dict()))
    L, F, D = config.n_layers, config.layer_latents, config.d_in
    with torch.device("meta"):
        made = theirs.CrossLayerTranscoder(
            L,
            F,
            D,
            activation_function="jump_relu",
            lazy_decoder=True,
            feature_input_hook=feature_input_hook,
            feature_output_hook=feature_output_hook,
            scan=scan,
            dtype=tensors["W_enc"].dtype,
        )
    state = {
        "W_enc": tensors["W_enc"].view(L, F, D),
        "b_enc": tensors["b_enc"].view(L, F),
        "b_dec": tensors["b_dec"].view(L, D),
        "activation_function.threshold": tensors["threshold"].view(L, 1, F),
    }
    made.load_state_dict(state, assign=True)

    def vectors(layer: int, features: torch.Tensor | None = None) -> torch.Tensor:
        """[n, layers from this one on, D]."""
        some = None if features is None else features.to(folded.W_dec.device)
        return folded.layer_decoders(layer, some).detach().to(made.device, made.dtype)

    made._get_decoder_vectors = vectors
    return made


def _install(installation: Installation) -> None:
    replace, clt = installation.patches.replace, importlib.import_module(_CLT).CrossLayerTranscoder
    replace(clt, "encode_sparse", attribution.encode_sparse(installation))
    replace(clt, "compute_attribution_components", attribution.components(installation))
    lens, nnsight = (
        importlib.import_module(_CONTEXTS + name).AttributionContext
        for name in ("transformerlens", "nnsight")
    )
    replace(lens, "_compute_score_hook", attribution.score_hook)
    replace(nnsight, "compute_score", attribution.score)
    model = importlib.import_module(_MODEL).TransformerLensReplacementModel
    replace(model, "run_forward_pass", attribution.forward_pass(installation))


def _modules_of(target: Any) -> Iterable[torch.nn.Module]:
    clt = importlib.import_module(_CLT).CrossLayerTranscoder
    target = getattr(target, "transcoders", target)  # a replacement model's
    return [target] if isinstance(target, clt) else []


# What is replaced or relied on, and its code in the tested versions.
_CODE = {
    f"{_CLT}:CrossLayerTranscoder.encode_sparse": "102d464504bd",
    f"{_CLT}:CrossLayerTranscoder.select_decoder_vectors": "ba6b53d0ad35",
    f"{_CLT}:CrossLayerTranscoder.compute_reconstruction": "e2da1738c3f0",
    f"{_CLT}:CrossLayerTranscoder.compute_attribution_components": "d8c2158d2d47",
    f"{_CONTEXTS}transformerlens:AttributionContext": "c4a52cb213c3",
    f"{_CONTEXTS}nnsight:AttributionContext": "0637e752673f",
    f"{_MODEL}:TransformerLensReplacementModel.run_forward_pass": "5644a681f25e",
}

ADAPTER = Adapter(
    distribution="circuit-tracer",
    tested=("0.5.0",),
    oldest="0.5",
    below="0.6",
    levels=("module",),
    seams=_CODE,
    install=_install,
    modules_of=_modules_of,
    optimizers_of=lambda target: (),
)
