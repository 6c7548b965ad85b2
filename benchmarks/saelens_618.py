"""A pytest plugin that runs SAELens' tests of version 6.18 on version 6.54, without a network.

The tests want a model, its tokenizer and a data set from the hub: here they are a random model of
that shape, a tokenizer of bytes and random sentences. Where 6.54 renamed something that the tests
call, the old name is put back.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import random
import sys
import types
from typing import Any

MODEL = "tiny-stories-1M"
SENTENCE = "once upon a time there was a little girl who liked to play with her ball and dog"
WORDS = SENTENCE.split()


def pytest_sessionstart(session: Any) -> None:
    """Puts the stand-ins in place, before a test is collected."""
    _old_names()
    _absent()
    sys.path.insert(0, str(session.config.rootpath))
    import tests.helpers  # noqa: F401, theirs

    _models()
    _datasets()


def _old_names() -> None:
    from sae_lens.saes import sae
    from sae_lens.training import sae_trainer

    made = sae.TrainStepInput.__init__

    def with_default(self: Any, *args: Any, is_logging_step: bool = False, **kwargs: Any) -> None:
        made(self, *args, is_logging_step=is_logging_step, **kwargs)

    sae.TrainStepInput.__init__ = with_default
    trainer = sae_trainer.SAETrainer
    trainer._build_train_step_log_dict = trainer.build_train_step_log_dict


def _absent() -> None:
    """Packages that some of the tests compare with: those fail, the others of their file run."""
    for name, members in {"sparsify": ("SparseCoder", "SparseCoderConfig")}.items():
        if importlib.util.find_spec(name) is None:
            module = sys.modules[name] = types.ModuleType(name)
            for member in members:
                setattr(module, member, None)


@functools.cache
def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[end], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([SENTENCE] * 10, trainer)
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end,
        eos_token=end,
        unk_token=end,
        pad_token=end,
        name_or_path="local/tiny",
    )
    found.init_kwargs["name_or_path"] = "local/tiny"
    found.init_kwargs.setdefault("add_bos_token", True)
    return found


@functools.cache
def _model() -> Any:
    import torch
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(7)
    config = HookedTransformerConfig(
        n_layers=2,
        d_model=64,
        n_ctx=64,
        d_head=4,
        n_heads=16,
        d_mlp=256,
        d_vocab=400,
        act_fn="gelu_new",
        normalization_type="LN",
        model_name=MODEL,
        tokenizer_prepends_bos=False,
        default_prepend_bos=True,
        seed=7,
    )
    model = HookedTransformer(config)
    model.tokenizer = _tokenizer()
    model.cfg.tokenizer_name = "roneneldan/TinyStories-1M"
    return model


def _models() -> None:
    from transformer_lens import HookedTransformer

    def load_model_cached(name: str) -> Any:
        return copy.deepcopy(_model())

    _replace_everywhere("load_model_cached", load_model_cached)
    fetch = HookedTransformer.from_pretrained.__func__

    def from_pretrained(cls: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        if "tiny-stories" in name:
            return load_model_cached(name)
        return fetch(cls, name, *args, **kwargs)

    HookedTransformer.from_pretrained = classmethod(from_pretrained)


def _datasets() -> None:
    import datasets

    chance = random.Random(0)
    rows = [{"text": " ".join(chance.choices(WORDS, k=60))} for _ in range(600)]
    fetch = datasets.load_dataset

    def load_dataset(path: Any, *args: Any, **kwargs: Any) -> Any:
        if "c4-10k" not in str(path):
            return fetch(path, *args, **kwargs)
        found = datasets.Dataset.from_list(rows)
        if kwargs.get("streaming"):
            return found.to_iterable_dataset()
        whole = kwargs.get("split") or (args and isinstance(args[0], str))
        return found if whole else datasets.DatasetDict(train=found)

    _replace_everywhere("load_dataset", load_dataset)


def _replace_everywhere(name: str, value: Any) -> None:
    """Sets a function in all modules that have imported it by name."""
    for module in list(sys.modules.values()):
        if callable(getattr(module, name, None)) and hasattr(module, "__dict__"):
            setattr(module, name, value)
