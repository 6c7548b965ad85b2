"""Chunks joined are the document, for six kinds of tokenizers made here from `tokenizers` alone."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import causal
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_kernels.config.row_filter import KEEP_ALL, RowFilter
from sae_kernels.data.shards import ShardDataset
from sae_kernels.errors import DataError, ModelError
from sae_kernels.harvest import harvest
from sae_kernels.harvest.chunks import cut_documents

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

transformers = pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")
tokenizers = pytest.importorskip("tokenizers", reason="needs sae-kernels[harvest]")

LINES = ["the cat sat on the mat", "a dog ran far away and saw one cat", "naïve café 東京 🐈"] * 9


def _byte_bpe() -> Any:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    return _trained(made, tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet))


def _word_piece() -> Any:
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.BertNormalizer()
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    return _trained(made, tokenizers.trainers.WordPieceTrainer(special_tokens=["[UNK]"]))


def _unigram() -> Any:
    made = tokenizers.Tokenizer(tokenizers.models.Unigram())
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=60, unk_token="<unk>", special_tokens=["<unk>"]
    )
    return _trained(made, trainer)


def _trained(made: Any, trainer: Any) -> Any:
    trainer.show_progress = False
    made.train_from_iterator(LINES, trainer)
    made.add_special_tokens(["<s>", "</s>", "<|im_start|>", "[PAD]"])
    return made


def _fast(made: Any, template: str = "$A", **options: Any) -> Any:
    ids = [(token, made.token_to_id(token)) for token in ("<s>", "</s>")]
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=ids
    )
    options = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]"} | options
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **options)


def _cut_left(template: str) -> Any:
    fast = _fast(_word_piece(), template, unk_token="[UNK]", truncation_side="left")
    fast.backend_tokenizer.enable_truncation(5, direction="left")
    return fast


def _padded_left(template: str) -> Any:
    fast = _fast(_byte_bpe(), template, padding_side="left")
    fast.backend_tokenizer.enable_padding(direction="left", length=40)
    return fast


KINDS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "byte-level BPE": ("$A", lambda template: _fast(_byte_bpe(), template)),
    "WordPiece": ("<s> $A </s>", lambda t: _fast(_word_piece(), t, unk_token="[UNK]")),
    "Unigram": ("$A </s>", lambda t: _fast(_unigram(), t, unk_token="<unk>")),
    "with BOS": ("<s> $A", lambda t: _fast(_unigram(), t, unk_token="<unk>")),
    "truncated on the left": ("<s> $A </s>", _cut_left),
    "padded on the left": ("<s> $A", _padded_left),
}


def _made(kind: str) -> Any:
    template, make = KINDS[kind]
    return make(template)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Any:
    """A tokenizer, a bare one of the same model, and the ids that go before and after a text."""
    fast = _made(request.param)
    bare = tokenizers.Tokenizer.from_str(fast.backend_tokenizer.to_str())
    bare.no_truncation()
    bare.no_padding()
    before, _, after = KINDS[request.param][0].partition("$A")
    return fast, bare, *(fast.convert_tokens_to_ids(part.split()) for part in (before, after))


# Anything that a file may hold: all planes, controls, marks that combine; no half surrogate pairs.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
WORDS = st.lists(st.sampled_from([*" ".join(LINES[:3]).split(), "<s>", "</s>", "\n", "  "]))
DOCUMENTS = st.lists(ANY_TEXT | WORDS.map(" ".join), max_size=5)


@settings(max_examples=settings.default.max_examples // 4)  # of each of six kinds
@given(documents=DOCUMENTS, length=st.integers(3, 12))
def test_chunks_joined_are_the_document(kind: Any, documents: list[str], length: int) -> None:
    fast, bare, before, after = kind
    pieces: dict[int, list[int]] = {}
    full: dict[int, list[bool]] = {}
    for chunk in cut_documents(fast, documents, length, KEEP_ALL):
        ids = chunk.ids.tolist()
        assert ids[: len(before)] == before
        assert ids[len(ids) - len(after) :] == after
        assert chunk.kept.all()
        pieces.setdefault(chunk.document, []).extend(ids[len(before) : len(ids) - len(after)])
        full.setdefault(chunk.document, []).append(len(ids) == length)
    assert list(pieces) == list(range(len(documents)))
    for number, text in enumerate(documents):
        assert pieces[number] == bare.encode(text, add_special_tokens=False).ids
        assert all(full[number][:-1])


def test_the_tokenizers_own_settings_stay(kind: Any) -> None:
    fast, *_ = kind
    for truncation, padding in itertools.product([None, {"max_length": 4}], [None, {"length": 8}]):
        backend = fast.backend_tokenizer
        backend.enable_truncation(**truncation) if truncation else backend.no_truncation()
        backend.enable_padding(**padding) if padding else backend.no_padding()
        before = backend.to_str()
        (chunk,) = cut_documents(fast, ["the cat sat on"], 128, KEEP_ALL)
        assert len(chunk.ids) > 3
        assert fast.pad_token_id not in chunk.ids
        assert backend.to_str() == before


def test_a_long_document_warns_of_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    fast = _made("WordPiece")
    fast.model_max_length = 4
    assert len(list(cut_documents(fast, ["the cat " * 9], 4, KEEP_ALL))) == 9
    assert capfd.readouterr() == ("", "")


WORD_IDS = {word: i for i, word in enumerate(["[PAD]", "<s>", "</s>", "[UNK]", "a", "b", "c"])}


def words(template: str = "<s> $A </s>", **options: Any) -> Any:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORD_IDS, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return _fast(made, template, **{"unk_token": "[UNK]"} | options)


def _kept(fast: Any, text: str, **options: Any) -> list[list[int]]:
    chunks = cut_documents(fast, [text], 5, RowFilter(**options))
    kept = [chunk.ids[chunk.kept].tolist() for chunk in chunks]
    rows = [chunk.rows for chunk in cut_documents(fast, [text], 5, RowFilter(**options))]
    assert rows == [len(each) for each in kept]
    return kept


def test_special_tokens_of_the_text_are_left_out_and_its_unknown_words_stay() -> None:
    # <s> a [UNK] <s> </s> | <s> b [PAD] a </s>
    assert _kept(words(), "a x <s> b [PAD] a") == [[4, 3], [5, 4]]
    assert _kept(words(), "a x <s>", drop_special_tokens=False) == [[1, 4, 3, 1, 2]]
    # One token for everything, as in GPT-2: what stands for unknown words ends texts as well.
    both = words(unk_token="[UNK]", bos_token="[UNK]", eos_token="[UNK]")
    assert _kept(both, "a x b") == [[4, 5]]


def test_special_tokens_that_have_no_name_are_special() -> None:
    fast = _made("byte-level BPE")
    assert "<|im_start|>" not in fast.special_tokens_map.values()
    (chunk,) = cut_documents(fast, ["<|im_start|>a"], 8, RowFilter())
    assert chunk.kept.tolist() == [False, True]


def test_the_first_tokens_of_every_chunk() -> None:
    # <s> a b c </s> | <s> a b c </s>: the model sees <s> at position 0 of each.
    text = "a b c a b c"
    assert _kept(words(), text, drop_first=1) == [[4, 5, 6], [4, 5, 6]]
    assert _kept(words(), text, drop_first=3) == [[6], [6]]
    assert _kept(words(), text, drop_first=99) == [[], []]
    options = {"drop_first": 1, "drop_special_tokens": False}
    assert _kept(words(), text, **options) == [[4, 5, 6, 2], [4, 5, 6, 2]]
    assert _kept(words("$A"), "a b c a b c", **options) == [[5, 6, 4, 5], []]


def test_tokens_by_their_ids() -> None:
    text = "a b c a b c"
    assert _kept(words(), text, drop_tokens=(4, 6)) == [[5], [5]]
    options = {"drop_special_tokens": False, "drop_tokens": (1, 5)}  # added ones as well
    assert _kept(words(), text, **options) == [[4, 6, 2], [4, 6, 2]]


def test_the_model_sees_what_is_left_out(tmp_path: Path) -> None:
    model, fast, texts = causal.gpt2(), causal.tokenizer(), causal.documents(20)
    stored = {}
    for name, chosen in (("all", KEEP_ALL), ("some", RowFilter(drop_first=2, drop_tokens=(4, 7)))):
        options: dict[str, Any] = {"context_length": causal.CONTEXT, "row_filter": chosen}
        n = harvest(model, fast, texts, causal.LAYER, tmp_path / name, **options)
        stored[name] = ShardDataset(tmp_path / name).rows(0, n)
    kept = torch.cat(
        [
            (torch.arange(len(chunk.ids)) >= 2) & (chunk.ids != 4) & (chunk.ids != 7)
            for chunk in cut_documents(fast, texts, causal.CONTEXT, KEEP_ALL)
        ]
    )
    assert 0 < kept.sum() < len(kept)
    assert torch.equal(stored["some"].activations, stored["all"].activations[kept])
    assert torch.equal(stored["some"].tokens, stored["all"].tokens[kept])
    assert torch.equal(stored["some"].documents, stored["all"].documents[kept])


def test_documents_that_are_no_text() -> None:
    def cut(documents: Any) -> None:
        list(cut_documents(words(), documents, 5, KEEP_ALL))

    for wrong in (3, b"a", None, ["a", "b"]):
        with pytest.raises(TypeError, match="document 1: expected a string, got"):
            cut(["a", wrong])
    with pytest.raises(DataError, match=r"document 65: .*half a surrogate pair \('\\ud83d' at cha"):
        cut(["a"] * 65 + ["cat \ud83d"])


def test_a_tokenizer_that_adds_inside_the_text() -> None:
    fast = words("$A <s> $A")
    with pytest.raises(ModelError, match="adds special tokens before and after the text"):
        list(cut_documents(fast, ["a b"], 9, KEEP_ALL))


def test_ids_are_int64_and_an_empty_document_has_one_chunk() -> None:
    chunks = list(cut_documents(words(), ["", "a", " "], 5, KEEP_ALL))
    assert [chunk.ids.tolist() for chunk in chunks] == [[1, 2], [1, 4, 2], [1, 2]]
    assert {chunk.ids.dtype for chunk in chunks} == {torch.int64}
    assert [chunk.rows for chunk in cut_documents(words(), ["", " "], 5, RowFilter())] == [0, 0]
