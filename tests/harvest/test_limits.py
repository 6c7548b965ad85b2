"""What a model or its tokenizer cannot do, on tiny random models of many kinds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from causal import documents, gpt2, tokenizer

from sae_kernels.config.row_filter import KEEP_ALL, RowFilter
from sae_kernels.data.shards import ShardDataset
from sae_kernels.errors import DataError, ModelError
from sae_kernels.harvest import LiveBatches, harvest, token_batches
from sae_kernels.harvest.limits import longest_context, padding_id

if TYPE_CHECKING:
    from pathlib import Path

transformers = pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")

SIZES = {
    "vocab_size": 15,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
T5 = {"vocab_size": 15, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2}
BART = {"vocab_size": 15, "d_model": 16, "max_position_embeddings": 12} | {
    f"{part}_{name}": n
    for part in ("encoder", "decoder")
    for name, n in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))
}


def _model(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}Model")(
        getattr(transformers, f"{kind}Config")(**options)
    ).eval()


def _words(**options: Any) -> Any:
    """15 tokens: [PAD], [UNK] and words."""
    fast = tokenizer()
    for name, value in options.items():
        setattr(fast, name, value)
    return fast


def _take(folder: Path, model: Any, layer: str, fast: Any = None, **options: Any) -> int:
    texts = options.pop("documents", documents(9))
    given = {"context_length": 10, "row_filter": KEEP_ALL} | options
    return harvest(model, fast or _words(), texts, layer, folder, **given)


def test_a_pad_token_outside_the_embedding_pads_with_another(tmp_path: Path) -> None:
    model, fast = gpt2().transformer, _words()
    fast.add_special_tokens({"pad_token": "<pad>"})
    assert fast.pad_token_id == 15 == model.wte.num_embeddings
    assert padding_id(model, fast) == 0
    n = _take(tmp_path / "a", model, "h.1", fast)
    assert n == _take(tmp_path / "b", model, "h.1")
    a, b = (ShardDataset(tmp_path / name).rows(0, n).activations for name in "ab")
    assert torch.equal(a, b)
    for batch in token_batches(gpt2(), fast, documents(9), context_length=10):
        assert int(batch.input_ids.max()) < 15


def test_a_token_outside_the_embedding_is_named_with_its_document(tmp_path: Path) -> None:
    fast = _words()
    fast.add_tokens(["zebra"])
    options: dict[str, Any] = {"context_length": 10}
    message = (
        r"document 2: expected tokens that the model knows, 0 to 14, got 15, 'zebra'; .*"
        r"resize_token_embeddings\(16\)"
    )
    texts = ["the cat", "a dog", "one zebra"]
    model = gpt2()
    with pytest.raises(ModelError, match=message):
        _take(tmp_path, model, "h.1", fast, documents=texts)
    with pytest.raises(DataError):
        ShardDataset(tmp_path)
    with pytest.raises(ModelError, match=message):
        next(LiveBatches(model, fast, texts, "h.1", 4, **options))
    with pytest.raises(ModelError, match=message):
        list(token_batches(model, fast, texts, **options))
    assert _take(tmp_path, model, "h.1", fast, documents=texts[:2]) == 4
    model.resize_token_embeddings(20)  # more than the tokenizer has is no fault
    assert _take(tmp_path, model, "h.1", fast, documents=texts, overwrite=True) == 6


@pytest.mark.parametrize(
    ("kind", "options", "longest"),
    [
        # 14 embeddings, of which those up to pad_token_id are of no position.
        ("Roberta", SIZES | {"max_position_embeddings": 14, "pad_token_id": 1}, 12),
        ("XLMRoberta", SIZES | {"max_position_embeddings": 14, "pad_token_id": 1}, 12),
        ("MPNet", SIZES | {"max_position_embeddings": 14, "pad_token_id": 1}, 12),
        ("Bert", SIZES | {"max_position_embeddings": 12, "pad_token_id": 1}, 12),
        # Their tables have two rows more than positions.
        (
            "OPT",
            {**SIZES, "ffn_dim": 32, "max_position_embeddings": 12, "word_embed_proj_dim": 16},
            12,
        ),
        ("Bart", BART, 12),
    ],
)
def test_the_longest_context(
    tmp_path: Path, kind: str, options: dict[str, Any], longest: int
) -> None:
    model = _model(kind, **options)
    assert longest_context(model, _words()) == longest
    layers = {"OPT": "decoder.layers.1", "Bart": "encoder.layers.1"}
    layer = layers.get(kind, "encoder.layer.1")
    texts = ["the cat sat on a mat and " * 9]
    with pytest.raises(ModelError, match="context_length from 1 to 12 for this model, got 13"):
        _take(tmp_path, model, layer, context_length=13, documents=texts)
    assert _take(tmp_path, model, layer, context_length=12, documents=texts) == 63


def test_a_limit_that_only_running_shows(tmp_path: Path) -> None:
    """Its settings promise 99 positions; the table has 20, as after a conversion gone wrong."""
    model = gpt2().transformer
    model.config.n_positions = 99
    with pytest.raises(ModelError, match="context_length up to 20, the longest that GPT2Model tak"):
        _take(tmp_path, model, "h.1", context_length=64)
    with pytest.raises(ModelError, match=r"up to 20, .* got 21 \(IndexError: index out of range"):
        LiveBatches(model, _words(), documents(9), "h.1", 4, context_length=21)
    assert _take(tmp_path, model, "h.1", context_length=20)


@pytest.mark.parametrize("stated", [10**30, 16])
def test_relative_attention_has_no_limit_but_the_tokenizers(tmp_path: Path, stated: int) -> None:
    model = transformers.T5EncoderModel(transformers.T5Config(**T5)).eval()
    fast = _words(model_max_length=stated)
    assert longest_context(model, fast) == (None if stated > 16 else 16)
    xlnet = _model("XLNet", vocab_size=15, d_model=16, n_layer=1, n_head=2, d_inner=32)
    assert xlnet.config.max_position_embeddings == -1
    assert longest_context(xlnet, fast) == longest_context(model, fast)
    if stated == 16:
        with pytest.raises(ModelError, match="from 1 to 16 for this model, got 100"):
            _take(tmp_path, model, "encoder.block.1", fast, context_length=100)
    else:
        assert _take(tmp_path, model, "encoder.block.1", fast, context_length=100)
        with pytest.raises(ValueError, match="from 1 or more for this model, got 0"):
            _take(tmp_path, model, "encoder.block.1", fast, context_length=0)


def test_a_sliding_window_is_no_limit(tmp_path: Path) -> None:
    options = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 40}
    model = _model("Mistral", **options, sliding_window=4)
    assert _take(tmp_path, model, "layers.1", context_length=40)


@pytest.mark.parametrize(
    ("kind", "options", "decoder", "encoder"),
    [
        ("T5", T5, "decoder.block.0", "encoder.block.0"),
        ("Bart", BART, "decoder.layers.0", "encoder.layers.0"),  # would run, one token late
    ],
)
def test_a_decoder_that_reads_an_encoder(
    tmp_path: Path, kind: str, options: dict[str, Any], decoder: str, encoder: str
) -> None:
    model = _model(kind, **options)
    message = f"got {decoder} of a decoder, .* choose one of the encoder, such as {encoder}$"
    with pytest.raises(ModelError, match=message):
        _take(tmp_path, model, decoder)
    with pytest.raises(ModelError, match=message):
        LiveBatches(model, _words(), documents(9), [encoder, decoder], 4, context_length=10)
    assert _take(tmp_path, model, encoder)


def test_a_model_of_images_reads_no_text(tmp_path: Path) -> None:
    image = {"image_size": 4, "patch_size": 2, "num_channels": 1}
    small = {name: n for name, n in SIZES.items() if name != "vocab_size"}
    with pytest.raises(ModelError, match="ViTModel reads pixel_values; choose a language model"):
        _take(tmp_path, _model("ViT", **small, **image), "encoder.layer.0")
    text = {**SIZES, "max_position_embeddings": 12, "eos_token_id": 1}
    both = _model("CLIP", text_config=text, vision_config={**small, **image}, projection_dim=8)
    with pytest.raises(ModelError, match=r"CLIPModel to run on token ids .* reads text alone"):
        _take(tmp_path, both, "text_model.encoder.layers.0")
    assert longest_context(both, _words()) == 12


@pytest.mark.parametrize("token", [-1, 15, 10**12])
def test_ids_to_leave_out_are_of_the_vocabulary(tmp_path: Path, token: int) -> None:
    filters = RowFilter(drop_tokens=(3, token))
    message = f"drop_tokens: expected ids of the vocabulary, 0 to 14, got {token};"
    with pytest.raises(ValueError, match=message):
        _take(tmp_path, gpt2(), "h.1", row_filter=filters)
    with pytest.raises(ValueError, match=message):
        LiveBatches(gpt2(), _words(), documents(9), "h.1", 4, context_length=8, row_filter=filters)
