"""Where a model is put and in which dtype, and what of it the index records."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels.data import ShardDataset
from sae_kernels.errors import ModelError
from sae_kernels.harvest import (
    harvest,
    language_model_loss,
    layer_device,
    layer_output,
    load_causal_model,
    load_model,
    resolve_layer,
    token_batches,
)
from sae_kernels.nn import TopKConfig, TopKSAE
from tests.harvest.causal import CONTEXT, LAYER, D, documents, gpt2, tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

transformers = pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")

TEXT = documents(6)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16."""
    folder = tmp_path_factory.mktemp("model")
    gpt2().bfloat16().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("load", [load_model, load_causal_model])
@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        (None, torch.bfloat16),  # the checkpoint's
        ("float32", torch.float32),
        ("float16", torch.float16),
        (torch.float32, torch.float32),
    ],
)
def test_the_dtype_is_the_checkpoints_or_the_given_one(
    saved: Path, load: Callable[..., Any], given: Any, dtype: torch.dtype
) -> None:
    model, _ = load(saved, dtype=given)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not model.training
    weight = resolve_layer(model, "wte").weight
    assert torch.equal(weight.float(), gpt2().bfloat16().transformer.wte.weight.float())


def test_what_is_computed_in_a_dtype_is_stored(saved: Path, tmp_path: Path) -> None:
    n = {}
    for dtype in ("float32", "bfloat16"):
        model, words = load_model(saved, dtype=dtype)
        n[dtype] = harvest(model, words, TEXT, LAYER, tmp_path / dtype, context_length=CONTEXT)
        data = ShardDataset(tmp_path / dtype)
        ids = torch.tensor([words(TEXT[1])["input_ids"][:CONTEXT]])
        with torch.no_grad():
            expected = layer_output(model, model.h[1], input_ids=ids)[0]
        assert expected.dtype == getattr(torch, dtype)
        rows = data.rows(0, n[dtype])
        mine = rows.activations[rows.documents == 1][: len(expected)]
        bound = {"float32": 1e-5, "bfloat16": 2**-6}[dtype]  # other shapes of batches round
        assert (mine - expected.float()).norm() <= bound * expected.float().norm()
        assert data.metadata["model_dtype"] == dtype
        assert data.dtype == torch.float32
    rows = [ShardDataset(tmp_path / dtype).rows(0, n[dtype]).activations for dtype in n]
    assert 1e-3 < (rows[1] - rows[0]).norm() / rows[0].norm() < 0.1
    assert torch.equal(rows[1], rows[1].bfloat16().float())


def test_the_index_records_where_the_rows_come_from(saved: Path, tmp_path: Path) -> None:
    model, words = load_model(saved, device="cpu")
    harvest(model, words, TEXT, LAYER, tmp_path, context_length=CONTEXT, metadata={"mine": 3})
    found = ShardDataset(tmp_path).metadata
    expected = {
        "model": str(saved),
        "revision": None,  # of the hub alone
        "layer": LAYER,
        "model_dtype": "bfloat16",
        "device": "cpu",
        "mine": 3,
        "context_length": CONTEXT,
        "batch_size": 16,
        "nonfinite_rows": 0,
    }
    assert found.items() >= expected.items()
    assert len(found["weights"]) == 32
    for name in ("torch", "transformers", "tokenizers"):
        assert found["versions"][name] == importlib.metadata.version(name)


def test_a_commit_of_the_hub_is_recorded(tmp_path: Path) -> None:
    model = gpt2()
    model.config._commit_hash = "0123abc"  # as transformers sets it for a model of the hub
    harvest(model, tokenizer(), TEXT, LAYER, tmp_path, context_length=CONTEXT)
    assert ShardDataset(tmp_path).metadata["revision"] == "0123abc"


@pytest.mark.parametrize("load", [load_model, load_causal_model])
@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), None])
def test_the_device_arrives(saved: Path, load: Callable[..., Any], device: Any) -> None:
    model, _ = load(saved, device=device)
    assert {p.device for p in model.parameters()} == {torch.device("cpu")}
    assert layer_device(model, LAYER) == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_auto_is_the_cpu_without_a_gpu_and_cuda_is_refused(saved: Path) -> None:
    model, _ = load_model(saved, device="auto")
    assert model.device == torch.device("cpu")
    with pytest.raises(ValueError, match="device: expected a GPU that is there, got 'cuda'"):
        load_model(saved, device="cuda")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "model dtype: expected one of float32, bfloat16, float16, or None"),
        ({"dtype": torch.float64}, r"got torch\.float64"),
        ({"device": "gpu"}, "device: expected auto, cpu or cuda:0, got 'gpu'"),
        ({"device": "cpu", "device_map": "auto"}, "a device or a device_map, got both"),
    ],
)
def test_places_that_are_none(saved: Path, options: dict[str, Any], message: str) -> None:
    for load in (load_model, load_causal_model):
        with pytest.raises(ValueError, match=message):
            load(saved, **options)


has_accelerate = importlib.util.find_spec("accelerate") is not None


@pytest.mark.skipif(has_accelerate, reason="needs an environment without accelerate")
def test_a_map_without_accelerate_says_what_to_install(saved: Path) -> None:
    with pytest.raises(ImportError, match="pip install accelerate"):
        load_model(saved, device_map="auto")


@pytest.mark.skipif(not has_accelerate, reason="needs accelerate")
def test_a_map_gives_the_same_rows(saved: Path, tmp_path: Path) -> None:
    """Also where the weights of some blocks stay on the disk until they are needed."""
    options: dict[str, Any] = {"context_length": CONTEXT}
    model, words = load_model(saved)
    n = harvest(model, words, TEXT, ["h.0", "h.1"], tmp_path / "plain", **options)
    parts = {"wte": "disk", "wpe": "cpu", "h.0": "cpu", "h.1": "disk", "h.2": "cpu", "ln_f": "cpu"}
    for number, device_map in enumerate(({"": "cpu"}, parts)):
        model, words = load_model(saved, device_map=device_map)
        folder = tmp_path / str(number)
        harvest(model, words, TEXT, ["h.0", "h.1"], folder, **options)
        for layer in ("h.0", "h.1"):
            rows = [ShardDataset(f / layer).rows(0, n) for f in (tmp_path / "plain", folder)]
            assert torch.equal(rows[0].activations, rows[1].activations)
        with pytest.raises(ModelError, match="nonsense"):
            load_model(saved, device_map="nonsense")


def test_an_sae_in_a_model_of_another_dtype(saved: Path) -> None:
    losses = {}
    for dtype in ("float32", "bfloat16"):
        model, words = load_causal_model(saved, dtype=dtype)
        batches = list(token_batches(model, words, TEXT, context_length=CONTEXT))
        torch.manual_seed(0)
        losses[dtype] = language_model_loss(model, batches, LAYER, TopKSAE(TopKConfig(D, 64, 4)))
    for one, other in zip(*(each.scalars().values() for each in losses.values()), strict=True):
        assert one == pytest.approx(other, rel=0.1)
