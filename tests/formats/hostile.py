"""Damage for every format: the corpus that `hostile_run` reads, one case after the other."""

from __future__ import annotations

import json
import os
import random
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import yaml
from foreign import D, F, exact_tensors
from hostile_arrays import NPZ
from hostile_pickles import OLD_PT, PT
from hostile_weights import SAFETENSORS
from makers import (
    MAKE,
    dictionary_learning,
    dictionary_learning_switch,
    gemma_scope,
    native_switch,
)
from safetensors.torch import save_file

from sae_kernels.nn import JumpReLUConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

FLIPS = 60  # of each file; many more with -m slow


class Case(NamedTuple):
    """What is done to a folder, and whether it must be refused or may also be read."""

    format: str
    name: str
    damage: Callable[[Path], object]
    must_fail: bool = True


def _old_pt(folder: Path) -> None:
    dictionary_learning(folder)
    tensors = torch.load(folder / "ae.pt", weights_only=True)
    torch.save(tensors, folder / "ae.pt", _use_new_zipfile_serialization=False)


def _packed_npz(folder: Path) -> None:
    gemma_scope(folder)
    np.savez_compressed(folder / "params.npz", **np.load(folder / "params.npz"))


def _gemma_scope_2(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    t = exact_tensors(JumpReLUConfig(D, F, log_threshold=False))
    theirs = {"w_enc": t["W_enc"].T.contiguous(), "w_dec": t["W_dec"]}
    theirs |= {name: t[name] for name in ("b_enc", "b_dec", "threshold")}
    save_file(theirs, folder / "params.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu", "d": 1}))


def _whitened(folder: Path) -> None:
    """A training checkpoint of SAELens; its whitening is the file that is damaged."""
    MAKE["saelens"](folder)
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg["normalize_activations"] = "covariance_whitening"
    (folder / "cfg.json").write_text(json.dumps(cfg))
    eye = torch.eye(D, dtype=torch.float64)
    whitening = {"mean": eye[0].clone(), "matrix": 2 * eye, "inverse_matrix": eye / 2}
    save_file(whitening, folder / "activation_whitening.safetensors")


# How a folder is made, its settings and its weights, and the cases made for such weights.
FORMATS: dict[str, tuple[Callable[[Path], None], str | None, str, Any]] = {
    "native": (MAKE["native"], "config.json", "sae.safetensors", SAFETENSORS),
    "native, switch": (native_switch, "config.json", "sae.safetensors", SAFETENSORS),
    "saelens": (MAKE["saelens"], "cfg.json", "sae_weights.safetensors", SAFETENSORS),
    "sparsify": (MAKE["sparsify"], "cfg.json", "sae.safetensors", SAFETENSORS),
    "dictionary_learning": (dictionary_learning, "config.json", "ae.pt", PT),
    "dictionary_learning, old": (_old_pt, "config.json", "ae.pt", OLD_PT),
    "dictionary_learning, switch": (dictionary_learning_switch, "config.json", "ae.pt", PT),
    "gemma_scope": (gemma_scope, None, "params.npz", NPZ),
    "gemma_scope, packed": (_packed_npz, None, "params.npz", NPZ),
    "gemma_scope, 2": (_gemma_scope_2, "config.json", "params.safetensors", SAFETENSORS),
    "circuit_tracer": (MAKE["circuit_tracer"], "config.yaml", "layer_3.safetensors", SAFETENSORS),
    "saelens, whitened": (
        _whitened,
        "cfg.json",
        "activation_whitening.safetensors",
        SAFETENSORS,
    ),
}
# Settings without which the weights say all.
OPTIONAL = ("gemma_scope, 2", "dictionary_learning", "dictionary_learning, old")


def corpus(format: str, folder: Path, flips: int = FLIPS) -> Iterator[Case]:
    """All cases of a format; `folder` holds its honest files."""
    _, settings, weights, special = FORMATS[format]
    for name, make, must_fail in special(weights, (folder / weights).read_bytes()):
        yield Case(format, name, make, must_fail)
    for file in filter(None, (settings, weights)):
        optional = format in OPTIONAL and file == settings
        yield from _damaged(format, file, (folder / file).read_bytes(), optional)
        yield from _flipped(format, file, (folder / file).read_bytes(), flips)
    if settings is not None:
        values = yaml.safe_load((folder / settings).read_text())  # JSON is YAML
        yield from _absurd(format, settings, values)
    if format == "circuit_tracer":
        yield from _yaml(format, settings)


def _write(file: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(content)


def _damaged(format: str, file: str, whole: bytes, optional: bool) -> Iterator[Case]:
    for sixteenth in range(16):
        cut = whole[: len(whole) * sixteenth // 16]
        yield Case(format, f"{file}: {sixteenth}/16", _write(file, cut), file[-4:] != "yaml")
    lines = file[-4:] in ("json", "yaml")  # whose last byte ends the last line
    yield Case(format, f"{file}: without its end", _write(file, whole[:-1]), not lines)
    yield Case(format, f"{file}: one byte more", _write(file, whole + b"\0"))
    noise = random.Random(3).randbytes(4096)
    yield Case(format, f"{file}: noise", _write(file, noise))
    for name, place in PLACES.items():
        of_gemma = optional and format == "gemma_scope, 2"  # which are read if they are a file
        ours = of_gemma or (optional and name == "missing") or name in MAY_BE_READ
        yield Case(format, f"{file}: {name}", lambda folder, p=place: p(folder / file), not ours)


def _flipped(format: str, file: str, whole: bytes, flips: int) -> Iterator[Case]:
    """One to eight bits a case; flips in the numbers of a file without checksums are numbers."""
    dice = random.Random(f"{format} {file}")
    for i in range(flips):
        content = bytearray(whole)
        for _ in range(dice.choice((1, 1, 1, 2, 8))):
            content[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
        yield Case(format, f"{file}: flip {i}", _write(file, bytes(content)), False)


def _in_place(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


def _elsewhere(path: Path) -> None:
    """The honest file under another name, and a link to it: the hub's cache is made so."""
    path.rename(path.with_name("blob"))
    path.symlink_to("blob")


def _huge(path: Path) -> None:
    os.truncate(path, 400 << 20)


PLACES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "a folder": _in_place(lambda path: path.mkdir()),
    "a named pipe": _in_place(os.mkfifo),
    "a device": _in_place(lambda path: path.symlink_to("/dev/zero")),
    "a link to itself": _in_place(lambda path: path.symlink_to(path.name)),
    "a link to nothing": _in_place(lambda path: path.symlink_to("nothing")),
    "a link to the file": _elsewhere,
    "400 MiB of a hole": _huge,
}
MAY_BE_READ = ("a link to the file",)

# -- settings --------------------------------------------------------------------------------------


def _nested(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = [value]
    return value


VALUES: dict[str, Any] = {
    "nan": float("nan"),
    "infinity": float("inf"),
    "-infinity": float("-inf"),
    "2^62": 2**62,
    "2^64": 2**64,
    "10^400": 10**400,
    "10^4000": 10**4000,
    "10^9": 10**9,
    "1e308": 1e308,
    "5e-324": 5e-324,
    "0": 0,
    "-1": -1,
    "half": 0.5,
    "null": None,
    "true": True,
    "text": "x" * 10_000,
    "lines": "a\nb\x00\ud800",
    "a list": [],
    "an object": {},
    "a tower": _nested(400),
    "a long list": [1] * 20_000,
    "huge numbers": [2**62] * 1000,
}
WHOLE: dict[str, bytes] = {
    "nothing but spaces": b" " * 10_000,
    "2 MiB": b"{" + b" " * (2 << 20) + b"}",
    "a million digits": b'{"d_in": ' + b"9" * 1_000_000 + b"}",
    "a tower": b'{"a":' * 100_000,
    "lists": b"[" + b"[]," * 300_000 + b"[]]",
    "another encoding": '{"d_in": 6}'.encode("utf-16"),
    "python": b"__import__('os').system('touch ran')",
    "a float that is none": b'{"d_in": 1e999999999}',
}


BOMBS: dict[str, str] = {
    "aliases of aliases": "a0: &a0 [x, x]\n"
    + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)),
    "an alias of itself": "a: &a [*a]",
    "merged keys": "a: &a {b: 1}\nc: {<<: *a}",
    "python": "!!python/object/apply:os.system ['touch ran']",
    "a python name": "a: !!python/name:os.system",
    "a tower": "[" * 30_000,
    "a tower of mappings": "{a: " * 8_000,
    "a tower of blocks": "- " * 15_000,
    "many keys": "".join(f"k{i}: 1\n" for i in range(3_500)),
    "many documents": "---\na: 1\n" * 3_000,
    "sixties": "a: " + ":".join(["59"] * 10_000),
    "a long number": "a: " + "9" * 30_000,
    "a long octal": "a: 0" + "7" * 30_000,
    "a long binary": "a: 0b" + "1" * 30_000,
    "underscores": "a: 1" + "_" * 30_000,
    "a float": "a: " + "1" * 15_000 + "." + "1" * 15_000,
    "an anchor as long": "a: &" + "b" * 30_000 + " 1",
    "a tag as long": "a: !" + "b" * 30_000 + " 1",
    "tabs": "a:\n" + "\t" * 30_000 + "b",
    "quotes": "a: '" + "'" * 30_000,
    "folded lines": "a: >\n" + " x\n" * 10_000,
    "comments": "#" * 30_000,
    "controls": "a: \x00\x1b",
    "a directive": "%YAML 9.9\n---\na: 1",
    "a set": "!!set {a, b}",
    "pairs": "!!pairs [a: 1, a: 2]",
    "dates": "a: 2001-12-14t21:59:43.10-05:00",
}


def _yaml(format: str, file: str) -> Iterator[Case]:
    for name, text in BOMBS.items():
        yield Case(format, f"{file}: {name}", _write(file, text.encode()), False)
    again = b"model_kind: transcoder_set\n" * 1000
    yield Case(format, f"{file}: a key a thousand times", _write(file, again), False)


def _absurd(format: str, file: str, values: dict[str, Any]) -> Iterator[Case]:
    for name, content in WHOLE.items():
        # Settings that nobody reads; to YAML it is text.
        may = format in ("gemma_scope, 2", "circuit_tracer") and name == "a float that is none"
        yield Case(format, f"{file}: {name}", _write(file, content), not may)
    inner = values.get("trainer", values)
    known = [*inner, "groups", "matryoshka_widths", "expansion_factor", "k", "d_out", "metadata"]
    for key in dict.fromkeys(known):
        for name, value in VALUES.items():
            changed = {**inner, key: value}
            whole = {"trainer": changed} if "trainer" in values else changed
            content = json.dumps(whole).encode()
            yield Case(format, f"{file}: {key} = {name}", _write(file, content), False)
    product = json.dumps({**values, "d_in": 10**4000, "n_layers": 10**4000}).encode()
    yield Case(format, f"{file}: a product", _write(file, product), False)
    twice = json.dumps(values)
    first = next(iter(values))
    content = f'{{"{first}": null, {twice[1:]}'.encode()
    yield Case(format, f"{file}: {first} twice", _write(file, content), False)
