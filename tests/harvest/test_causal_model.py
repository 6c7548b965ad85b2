"""Which models load as ones that predict the next token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from causal import VOCABULARY, gpt2, tokenizer

from sae_kernels.errors import ModelError
from sae_kernels.harvest import load_causal_model
from sae_kernels.testing import assert_bitwise

if TYPE_CHECKING:
    from pathlib import Path

transformers = pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")


def _saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def _bert(kind: str) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
    )
    return getattr(transformers, kind)(config)


def test_a_causal_model_loads_silently_and_whole(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = gpt2()
    folder = _saved(model, tmp_path)
    capfd.readouterr()
    loaded, words = load_causal_model(folder)
    assert capfd.readouterr() == ("", "")
    assert not loaded.training
    assert words("the cat")["input_ids"] == [2, 3]
    # Not the logits' bits: torch's products may round otherwise with weights at other addresses.
    for name, tensor in model.state_dict().items():
        assert_bitwise(name, loaded.state_dict()[name], tensor)
    ids = torch.tensor([[2, 3, 4]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_head_that_is_the_embedding_need_not_be_stored(tmp_path: Path) -> None:
    model = gpt2()
    loaded, _ = load_causal_model(_saved(model.transformer, tmp_path))
    assert_bitwise("head", loaded.lm_head.weight.data, model.lm_head.weight.data)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("BertModel", r"holds no weights for cls\.predictions\.\S+, .*saved with its head"),
        ("BertForMaskedLM", "depend on the tokens that follow; choose a causal model"),
        ("T5Model", r"whose kind \(t5\) has none that predicts the next token"),
    ],
)
def test_models_that_do_not_predict_the_next_token(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, message: str
) -> None:
    if kind == "T5Model":
        config = transformers.T5Config(vocab_size=15, d_model=8, d_kv=4, d_ff=8, num_layers=1)
        model = transformers.T5Model(config)
    else:
        model = _bert(kind)
    folder = _saved(model, tmp_path)
    capfd.readouterr()
    with pytest.raises(ModelError, match=message) as caught:
        load_causal_model(folder)
    assert str(folder) in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_the_rules_are_those_of_models_without_a_head(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing is there; check the path"):
        load_causal_model(tmp_path / "none")
    with pytest.raises(ModelError, match="safetensors weights"):
        load_causal_model(tmp_path)
    folder = _saved(gpt2(), tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_causal_model(folder)
