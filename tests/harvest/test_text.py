"""Where documents come from."""

from __future__ import annotations

import sys
import sysconfig
from typing import TYPE_CHECKING

import pytest

from sae_kernels.errors import DataError
from sae_kernels.harvest import python_corpus, read_documents, split_documents
from sae_kernels.harvest.text import _docstrings

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.full
def test_python_corpus_is_large_real_text_and_imports_nothing() -> None:
    from pydoc_data.topics import topics

    before = set(sys.modules)
    documents = python_corpus()
    assert set(sys.modules) <= before | {"pydoc_data.topics"}
    assert sum(map(len, documents)) > 1_000_000
    assert documents[: len(topics)] == [topics[name] for name in sorted(topics)]
    assert min(map(len, documents[len(topics) :])) >= 200
    assert any("Text wrapping and filling" in text for text in documents)


def test_python_corpus_leaves_out_tests_and_installed_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b.py", "a.py", "test/t.py", "x/site-packages/s.py", "x/y.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f'"""{name} {"." * 200}"""')
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(tmp_path))
    documents = [text.split()[0] for text in python_corpus()[-3:]]
    assert documents == ["a.py", "b.py", "x/y.py"]


def test_docstrings_of_a_module_are_joined_in_order(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text(
        f'''"""Module.{"m" * 100}"""
raise RuntimeError("never run")
if True:
    class A:
        """A.{"a" * 100}"""
        async def f(self):
            """f."""
            def inner():
                """Inner.

                  Indented. \\d{"i" * 200}
                Not.
                """
def g():
    """Too short to stand alone."""
'''
    )
    first, second = _docstrings(path)
    assert first == f"Module.{'m' * 100}\n\nA.{'a' * 100}"
    assert second == f"f.\n\nInner.\n\n  Indented. \\d{'i' * 200}\nNot."


@pytest.mark.parametrize("content", [b"def (", b'"""\xff"""', b"\0"])
def test_what_is_no_python_is_passed_over(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.py").write_bytes(content)
    assert _docstrings(tmp_path / "m.py") == []


def test_read_documents(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("one\n\nfile ü", "utf-8")
    (tmp_path / "deep" / "a.jsonl").write_text('{"text": "first"}\n\n{"text": "second", "n": 1}\n')
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "notes.md").write_text("left out of the folder")
    assert list(read_documents([tmp_path])) == ["one\n\nfile ü", "first", "second"]
    assert list(read_documents([tmp_path / "notes.md"])) == ["left out of the folder"]
    assert list(read_documents(str(tmp_path / "notes.md"))) == ["left out of the folder"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text"', r"a\.jsonl:2: expected one JSON object"),
        ("a.jsonl", b'{"words": "x"}', r"a\.jsonl:1: .* under \"text\", got {\"words"),
        ("a.jsonl", b'{"text": 3}', "under"),
        ("a.jsonl", b"[1]", "under"),
        ("a.txt", b"\xff\xfe", "UTF-8"),
    ],
)
def test_documents_that_cannot_be_read(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_documents([tmp_path]))


def test_missing_paths_show_before_the_first_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="does not exist"):
        read_documents([tmp_path / "a.txt", tmp_path / "b.txt"])
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"no \.txt or \.jsonl"):
        read_documents([tmp_path / "folder"])


def test_split_has_no_repetitions_and_the_share() -> None:
    texts = [f"document {i}" for i in range(1000)]
    train, held_out = split_documents([*texts, *(f" {text}\n" for text in texts)], 0.2)
    assert sorted(train + held_out) == sorted(texts)
    assert 150 < len(held_out) < 250


def test_a_document_stays_on_its_side() -> None:
    texts = [f"document {i}" for i in range(100)]
    train, held_out = split_documents(texts)
    assert split_documents(reversed(texts)) == (train, held_out)
    more = split_documents([*texts, *(f"later {i}" for i in range(100))])
    assert set(train) <= set(more[0])
    assert set(held_out) <= set(more[1])
    assert split_documents(texts, seed=1)[1] != held_out


@pytest.mark.parametrize("held_out", [0.001, 0.999])
def test_no_side_is_empty(held_out: float) -> None:
    for seed in range(5):
        train, held = split_documents(["a", "b"], held_out, seed)
        assert len(train) == len(held) == 1


def test_split_refuses() -> None:
    assert split_documents(["a", "a"], 0.0) == (["a"], [])
    with pytest.raises(ValueError, match="two different documents to split, got 1"):
        split_documents(["a", "a "])
    with pytest.raises(ValueError, match="below 1, got 1"):
        split_documents(["a", "b"], 1.0)
