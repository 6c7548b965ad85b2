"""A tiny random GPT-2 with a tokenizer of whole words, made here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from sae_kernels.codes import SparseCodes

if TYPE_CHECKING:
    from collections.abc import Callable

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "dog", "ran", "far", "away"]
VOCABULARY = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
D, LAYER, CONTEXT = 16, "h.1", 10


def gpt2(**changes: Any) -> Any:
    """Of three blocks, with weights so large that every layer matters."""
    import transformers

    torch.manual_seed(0)
    options: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "n_embd": D,
        "n_layer": 3,
        "n_head": 2,
        "n_positions": 20,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**options | changes)).eval()


def tokenizer(vocabulary: dict[str, int] = VOCABULARY) -> Any:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def sinking(word: str = "mat", factor: float = 300.0) -> Any:
    """The model with an enormous activation wherever a word stands, as at attention sinks."""
    model = gpt2()
    model.transformer.wte.weight.data[VOCABULARY[word]] *= factor
    return model


def documents(n: int) -> list[str]:
    """Of 0 to 25 words: empty ones, single words, and some of several chunks."""
    pick = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, 26, (n,), generator=pick).tolist()
    return [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=pick))
        for length in lengths
    ]


class Fake(NamedTuple):
    """What an SAE gives, as far as a splice looks at it."""

    x_hat: Tensor
    codes: SparseCodes


def sae_of(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Fake]:
    return lambda x: Fake(function(x), SparseCodes.from_dense(x, k=1))


class Replaced(nn.Module):
    """A block in the place of another: the splice as one would write it by hand."""

    def __init__(self, block: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.block, self.function = block, function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.block(*args, **kwargs)
        if isinstance(output, tuple):
            return (self.function(output[0]), *output[1:])
        return self.function(output)
