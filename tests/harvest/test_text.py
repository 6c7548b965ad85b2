"""Where documents come from."""

from __future__ import annotations

import codecs
import os
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
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


UTF_16_BE = b"\xfe\xff" + "café 🐈\r\n2".encode("utf-16-be")
UTF_32_BE = b"\x00\x00\xfe\xff" + "café".encode("utf-32-be")


@pytest.mark.parametrize(
    ("name", "content", "documents"),
    [
        ("a.txt", "café".encode(), ["café"]),
        ("a.txt", "café".encode("utf-8-sig"), ["café"]),
        ("a.txt", "café 🐈".encode("utf-16"), ["café 🐈"]),  # little end first, with the mark
        ("a.txt", UTF_16_BE, ["café 🐈\n2"]),
        ("a.txt", "café".encode("utf-32"), ["café"]),
        ("a.txt", UTF_32_BE, ["café"]),
        ("a.txt", b"one\r\n\r\ntwo\r\n", ["one\n\ntwo\n"]),
        ("a.txt", b"one\rtwo\r", ["one\ntwo\n"]),
        ("a.txt", b"one\r\ntwo\rthree\nfour", ["one\ntwo\nthree\nfour"]),
        ("a.txt", "a\u0085b\u2028c\vd\fe".encode(), ["a\u0085b\u2028c\vd\fe"]),
        ("a.txt", b"one\r\n\x1a", ["one\n"]),
        ("a.txt", b"a\x1ab", ["a\x1ab"]),
        ("a.txt", b"", []),
        ("a.txt", codecs.BOM_UTF8, []),
        ("a.txt", codecs.BOM_UTF16_LE, []),
        ("A.TXT", b"one", ["one"]),
        ("a.jsonl", b"", []),
        ("a.jsonl", b'{"text": "one"}\n{"text": "two"}', ["one", "two"]),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n', ["one", "two"]),
        ("a.jsonl", b'{"text": "one"}\r{"text": "two"}\r', ["one", "two"]),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "1"}\n\xef\xbb\xbf{"text": "2"}\n', ["1", "2"]),
        ("a.jsonl", '{"text": "one"}\n{"text": "café"}'.encode("utf-16"), ["one", "café"]),
        (
            "a.jsonl",
            '{"text": "a\u2028b\u0085c"}\n{"text": "2"}\n'.encode(),
            ["a\u2028b\u0085c", "2"],
        ),
        ("a.jsonl", rb'{"text": "a\r\nb\u0000c \ud83d\udc08"}', ["a\r\nb\0c 🐈"]),
        ("a.jsonl", b'{"text": "one"}\r\n\x1a', ["one"]),
        ("A.JsonL", b'{"text": "one"}', ["one"]),
    ],
)
def test_what_editors_leave(
    tmp_path: Path, name: str, content: bytes, documents: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert list(read_documents([tmp_path])) == documents
    assert list(read_documents([tmp_path / name])) == documents


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text"',
            r"a\.jsonl:2: expected one JSON object .*jq -c '\.'",
        ),
        ("a.jsonl", b'{\n "text": "x"\n}\n', r"a\.jsonl:1: expected one JSON object .*jq -c '\.'"),
        ("a.jsonl", b'[\n{"text": "x"}\n]', r"a\.jsonl:1: expected one JSON obj.*jq -c '\.\[\]'"),
        ("a.jsonl", b'[{"text": "x"}]', r"a\.jsonl:1: .* under \"text\", got \[.*jq -c '\.\[\]'"),
        ("a.jsonl", b'{"text": "x",}', r"a\.jsonl:1: expected one JSON object a line \([^;]*\)$"),
        ("a.jsonl", b'{"words": "x"}', r"a\.jsonl:1: .* under \"text\", got {\"words"),
        ("a.jsonl", b'{"text": 3}', "under"),
        ("a.jsonl", b"[1]", "under"),
        (
            "a.jsonl",
            rb'{"text": "x \ud83d"}',
            r"a\.jsonl:1: expected characters, got '\\ud83d', half",
        ),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\0"}', r"a\.jsonl:2: expected text, got a NUL"),
        (
            "a.jsonl",
            b'{"text": "x"}\n' * 9999 + b"\xff",
            "UTF-8 text, got the byte ff at byte 139986",
        ),
        ("a.txt", b"caf\xe9\r\n", r"a\.txt: expected UTF-8 .* byte e9 at byte 3; .*windows-1252"),
        ("a.txt", b"\xef\xbb\xbfcaf\xe9", "got the byte e9 at byte 6"),
        ("a.txt", "ab".encode("utf-16-le"), "NUL character after 1 others; UTF-16 without a byte"),
        ("a.txt", "ab".encode("utf-16") + b"\0", "UTF-16 text as its byte .* 00 at byte 6"),
        ("a.txt", b"\xff\xfe\x00\x00\x00\x00\x11\x00", "UTF-32 text as its byte .* at byte 4"),
    ],
)
def test_documents_that_cannot_be_read(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_documents([tmp_path]))


def test_links_and_folders_inside_a_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("one")
    (tmp_path / "data" / "round").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "folder.txt").mkdir()
    (tmp_path / "data" / "b.txt").symlink_to(tmp_path / "data" / "a.txt")
    (tmp_path / "linked").symlink_to(tmp_path / "data")
    assert list(read_documents(tmp_path / "data")) == ["one", "one"]
    assert list(read_documents(tmp_path / "linked")) == ["one", "one"]
    (tmp_path / "data" / "c.txt").symlink_to(tmp_path / "data" / "c.txt")
    with pytest.raises(DataError, match=r"c\.txt cannot be read"):
        list(read_documents(tmp_path / "data"))
    with pytest.raises(DataError, match="does not exist"):
        read_documents(tmp_path / "data" / "c.txt")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_read_and_its_faults_are_named(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for content in ("\ufeffone\r\n".encode("utf-16"), b"\xff"):
        with ThreadPoolExecutor() as pool:
            written = pool.submit(pipe.write_bytes, content)
            if content == b"\xff":
                with pytest.raises(DataError, match="expected UTF-8 text, got the byte ff;"):
                    list(read_documents(pipe))
            else:
                assert list(read_documents(pipe)) == ["\ufeffone\n"]
            written.result()


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
