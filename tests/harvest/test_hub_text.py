"""Text from folders that Hugging Face ``datasets`` wrote or reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from sae_kernels.errors import DataError
from sae_kernels.harvest import dataset_documents
from sae_kernels.harvest.text_windows import reopenable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

datasets = pytest.importorskip("datasets", reason="needs sae-kernels[datasets]")

ROWS: list[dict[str, Any]] = [{"text": f"document {i}", "n": i, "body": "b"} for i in range(30)]
TRAIN = [row["text"] for row in ROWS]
KINDS = ("parquet", "jsonl", "saved", "saved_dict", "saved_split")


@pytest.fixture(autouse=True)
def _quiet_and_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The cache in a folder of the test, no bars while it writes."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def _lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A dataset with the splits train and test, but for a single one saved."""
    made = tmp_path / request.param
    train = datasets.Dataset.from_list(ROWS)
    test = train.select(range(2))
    if request.param == "parquet":
        made.mkdir()
        train.to_parquet(str(made / "train.parquet"))
        test.to_parquet(str(made / "test.parquet"))
    elif request.param == "jsonl":
        _lines(made / "train.jsonl", ROWS)
        _lines(made / "test.jsonl", ROWS[:2])
    elif request.param == "saved":
        train.save_to_disk(str(made))
    elif request.param == "saved_split":
        _lines(tmp_path / "lines" / "train.jsonl", ROWS)
        datasets.load_dataset(str(tmp_path / "lines"), split="train").save_to_disk(str(made))
    else:
        datasets.DatasetDict(train=train, test=test).save_to_disk(str(made))
    return made


@pytest.mark.parametrize("folder", KINDS, indirect=True)
@pytest.mark.parametrize("streaming", [True, False])
def test_every_pass_gives_the_same_texts(folder: Path, streaming: bool) -> None:
    documents = dataset_documents(folder, streaming=streaming)
    assert list(documents) == TRAIN
    assert list(documents) == TRAIN
    fresh = reopenable(documents)
    first, second = fresh(), fresh()
    assert [next(first), next(first), next(second)] == [TRAIN[0], TRAIN[1], TRAIN[0]]
    assert list(dataset_documents(str(folder), column="body")) == ["b"] * 30
    if folder.name in ("parquet", "jsonl"):
        written = list((folder.parent / "cache").rglob("*.arrow"))
        assert bool(written) != streaming


@pytest.mark.parametrize("folder", ["parquet", "jsonl", "saved_dict"], indirect=True)
def test_splits(folder: Path) -> None:
    assert list(dataset_documents(folder, split="test")) == TRAIN[:2]
    with pytest.raises(DataError, match=r"'nope'.*train.*test|nope\. Available.*train.*test"):
        dataset_documents(folder, split="nope")


@pytest.mark.parametrize("folder", ["saved_split"], indirect=True)
def test_a_saved_split_is_not_taken_for_another(folder: Path) -> None:
    with pytest.raises(DataError, match="expected the split 'test', it holds 'train'"):
        dataset_documents(folder, split="test")


@pytest.mark.parametrize("folder", ["parquet"], indirect=True)
def test_a_part_of_a_split_where_it_does_not_stream(folder: Path) -> None:
    assert list(dataset_documents(folder, split="train[:10%]", streaming=False)) == TRAIN[:3]


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_columns_that_are_not_there_or_hold_no_text(folder: Path) -> None:
    with pytest.raises(DataError, match=r"column 'x' with text, there are .*text.*; name one"):
        dataset_documents(folder, column="x")
    with pytest.raises(DataError, match="row 1: expected a string in column 'n', got int"):
        dataset_documents(folder, column="n")


def test_blank_and_missing_texts_are_left_out(tmp_path: Path) -> None:
    _lines(tmp_path / "a" / "a.jsonl", [{"text": t} for t in (None, "a", " \n", "", " b")])
    assert list(dataset_documents(tmp_path / "a")) == ["a", " b"]


def test_a_row_that_turns_out_to_be_no_text_is_named(tmp_path: Path) -> None:
    texts = datasets.Dataset.from_dict({"text": [["a"], None]})
    texts.save_to_disk(str(tmp_path / "lists"))
    with pytest.raises(DataError, match=r"lists, row 1: expected a string .* got list"):
        dataset_documents(tmp_path / "lists")


def test_subsets_by_name(tmp_path: Path) -> None:
    _lines(tmp_path / "a" / "one.jsonl", [{"text": "1"}])
    _lines(tmp_path / "a" / "two.jsonl", [{"text": "2"}])
    names = "".join(f"- config_name: {n}\n  data_files: {n}.jsonl\n" for n in ("one", "two"))
    (tmp_path / "a" / "README.md").write_text(f"---\nconfigs:\n{names}---\n")
    assert list(dataset_documents(tmp_path / "a", subset="two")) == ["2"]
    for subset in (None, "three"):
        with pytest.raises(DataError, match=r"one.*two"):
            dataset_documents(tmp_path / "a", subset=subset)


@pytest.mark.parametrize("beside", [True, False])
def test_a_script_never_runs(tmp_path: Path, beside: bool) -> None:
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    if beside:
        _lines(folder / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"scripts are no longer supported.*evil\.py"):
        dataset_documents(folder)
    assert not (tmp_path / "ran").exists()


def test_what_cannot_be_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folders = {
        "empty": ({}, "doesn't contain any data files"),
        "rowless": ({"a.jsonl": b""}, "it has no rows"),
        "cut": ({"a.jsonl": b'{"text": "a"}\n{"te'}, "JSON"),
        "noise": ({"a.parquet": b"noise" * 100}, "not a parquet file"),
        "xml": ({"a.xml": b"<a/>"}, "expected a dataset of parquet, .* files, got .* 'xml'"),
        "torn": ({"state.json": b"{}", "dataset_info.json": b"{"}, "cannot be read"),
    }
    capfd.readouterr()
    for name, (files, message) in folders.items():
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            dataset_documents(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_names_that_are_no_dataset(tmp_path: Path) -> None:
    for missing in (tmp_path / "none", str(tmp_path / "none"), "./none"):
        with pytest.raises(DataError, match="nothing is there"):
            dataset_documents(missing)
    _lines(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(DataError, match=r"a\.jsonl is a file"):
        dataset_documents(tmp_path / "a.jsonl")
    # The library would take this for all parquet files below the working directory.
    with pytest.raises(DataError, match="parquet is a kind of file"):
        dataset_documents("parquet")


@pytest.mark.full
def test_a_hub_name_without_a_network(tmp_path: Path) -> None:
    code = "from sae_kernels.harvest import dataset_documents; dataset_documents('owner/name')"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert "DataError: owner/name, split 'train' cannot be read" in last


@pytest.mark.parametrize("version", [None, "3.6.0"])
def test_a_missing_or_older_library_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    if version:
        monkeypatch.setattr(datasets, "__version__", version)
    else:
        monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "sae-kernels\[datasets\]"'):
        dataset_documents(tmp_path)
