"""Command ``sae-kernels inspect``: describes a file or folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sae_kernels.cli.contents import contents
from sae_kernels.cli.options import Debug, Json
from sae_kernels.cli.output import Output
from sae_kernels.errors import DataError
from sae_kernels.formats.table import FORMATS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sae_kernels.data import ShardDataset

_BAR = 40  # columns of the histogram's longest bar
_SHOWN = (
    "a run, a checkpoint, a folder of activations, a saved SAE "
    f"({', '.join(FORMATS)}), a folder of several of these, or a .safetensors file"
)


def inspect(
    path: Annotated[Path, typer.Argument(help=f"Path of {_SHOWN}.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read everything and compare checksums.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a file or folder is and what it contains."""
    values = {"path": str(path), **look(path, verify)}
    output = Output(as_json)
    output.record(values)
    tensors, listed = values.pop("tensors", {}), values.pop("contents", [])
    bins = values.get("norms", {}).pop("histogram", [])
    output.table([(_plain(key), _plain(str(value))) for key, value in _rows(values)])
    if listed:
        output.text("")
        output.table([("path", "format", "contents"), *map(_line, listed)])
    if tensors:
        rows = [(n, str(t["shape"]), t["dtype"]) for n, t in tensors.items()]
        output.text("")
        output.table([("tensor", "shape", "dtype"), *(tuple(map(_plain, row)) for row in rows)])
    if bins:
        most = max(each["rows"] for each in bins)
        output.text("")
        output.table([("norm", "rows of the sample", ""), *(_bar(each, most) for each in bins)])


def look(path: Path, verify: bool) -> dict[str, Any]:
    """Describes a path by plain values; "kind" says what it is.

    Raises:
        DataError: an unknown kind of file, or a damaged one.
    """
    from sae_kernels import formats
    from sae_kernels.data.shard_index import INDEX
    from sae_kernels.runs.checkpoint import MANIFEST
    from sae_kernels.runs.folder import RUN_FILE

    if not path.exists():
        raise DataError(f"{path}: expected {_SHOWN}, there is nothing")
    if (path / RUN_FILE).is_file():
        return _run(path, verify)
    if (path / MANIFEST).is_file():
        return _checkpoint(path, verify)
    if (path / INDEX).is_file():
        return _activations(path, verify)
    if formats.present(path) and not _is_set(path):
        return _sae(path, formats.detect(path), verify)
    if path.is_dir() and (found := contents(path)) is not None:
        return {**found, **_no(verify)}
    if path.is_file() and path.suffix == ".safetensors":
        return {"kind": "safetensors", "bytes": path.stat().st_size, **_header(path), **_no(verify)}
    raise DataError(f"{path}: expected {_SHOWN}, got none of these")


def _bar(part: "Mapping[str, Any]", most: int) -> tuple[str, str, str]:
    """A line of the histogram, in which even a single row shows."""
    bar = "#" * -(-_BAR * part["rows"] // most)
    return f"{part['from']:.4g} to {part['to']:.4g}", f"{part['rows']:,}", bar


def _is_set(path: Path) -> bool:
    """Whether a folder holds SAEs of several layers."""
    from sae_kernels import formats

    return path.is_dir() and len([at for at, _ in formats.find(path) if at.parent == path]) > 1


def _run(path: Path, verify: bool) -> dict[str, Any]:
    from sae_kernels.config.toml import read_tables
    from sae_kernels.io.files import read_json
    from sae_kernels.runs import checkpoint
    from sae_kernels.runs.folder import METRICS_FILE, RESULT_FILE, RUN_FILE, SAE_FOLDER
    from sae_kernels.runs.metrics import read_metrics

    parent = path / checkpoint.CHECKPOINTS
    saved = [checkpoint.path_of(parent, step) for step in checkpoint.steps(parent)]
    finished = (path / RESULT_FILE).is_file()
    lines = read_metrics(path / METRICS_FILE) if (path / METRICS_FILE).is_file() else []
    if verify:
        for each in saved:
            checkpoint.verify(each)
    return {
        "kind": "run",
        "finished": finished,
        "checkpoints": [each.name for each in saved],
        "sae": str(path / SAE_FOLDER) if (path / SAE_FOLDER).is_dir() else None,
        "metric_lines": len(lines),
        **({"result": read_json(path / RESULT_FILE)} if finished else {}),
        **({"last": lines[-1]} if lines and not finished else {}),
        "settings": read_tables(path / RUN_FILE),
        **({"verified": f"{len(saved)} checkpoints"} if verify else {}),
    }


def _checkpoint(path: Path, verify: bool) -> dict[str, Any]:
    from sae_kernels.io.files import read_json
    from sae_kernels.runs import checkpoint

    if verify:
        checkpoint.verify(path)
    manifest = read_json(path / checkpoint.MANIFEST)
    files = manifest.get("files")
    if manifest.get("format") != checkpoint.FORMAT or not isinstance(files, dict):
        raise DataError(f"{path / checkpoint.MANIFEST}: expected that of a checkpoint; {_SHOWN}")
    sizes = {name: entry.get("bytes") for name, entry in files.items() if isinstance(entry, dict)}
    values = {name: read_json(path / name) for name in _named(path, files, ".json")}
    tensors = [_header(path / name)["tensors"] for name in _named(path, files, ".safetensors")]
    return {
        "kind": "checkpoint",
        "version": manifest.get("version"),
        "step": manifest.get("step"),
        "bytes": sizes,
        **values,
        "tensors": {name: entry for part in tensors for name, entry in part.items()},
        **({"verified": f"{len(files)} files"} if verify else {}),
    }


def _activations(path: Path, verify: bool) -> dict[str, Any]:
    from sae_kernels.data.shards import ShardDataset

    data = ShardDataset(path)
    if verify:
        data.verify()
    return {
        "kind": "activations",
        "n_tokens": data.n_tokens,
        "d_in": data.d_in,
        "dtype": str(data.dtype).removeprefix("torch."),
        "columns": list(data.columns),
        "metadata": data.metadata,
        **({"norms": _norms(data)} if data.n_tokens else {}),
        **({"verified": f"{data.n_tokens} rows"} if verify else {}),
    }


def _norms(data: "ShardDataset") -> dict[str, Any]:
    """The norms of a sample of rows from all shards, and how much of the variance few carry."""
    from sae_kernels.data.sample import NormSummary, sample_rows

    rows = sample_rows(data)
    finite = rows[rows.isfinite().all(1)]
    found = {"rows": len(rows), "nonfinite": len(rows) - len(finite)}
    if not len(finite):
        return found
    summary = NormSummary.of(finite)
    return {
        **found,
        "zero": summary.zeros,
        **summary.quantiles,
        "variance_of_largest_thousandth": summary.concentration.thousandth,
        "rows_of_half_the_variance": summary.concentration.rows_of_half,
        "histogram": [{"from": a, "to": b, "rows": n} for a, b, n in summary.bins],
    }


def _sae(path: Path, kind: str, verify: bool) -> dict[str, Any]:
    from sae_kernels import formats
    from sae_kernels.formats import native

    if kind == "native":
        from sae_kernels.io.files import read_json

        folder = path.parent if path.is_file() else path
        header = _header(folder / native.WEIGHTS_FILE)
        own = read_json(folder / native.CONFIG_FILE)
        return {"kind": "sae", "format": kind, "config": own, **header, **_no(verify)}
    config, tensors, metadata = formats.read(path, kind)
    return {
        "kind": "sae",
        "format": kind,
        "config": {"architecture": config.architecture, **config.to_dict()},
        "metadata": metadata,
        "tensors": {
            name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
            for name, t in tensors.items()
        },
        **_no(verify),
    }


def _header(path: Path) -> dict[str, Any]:
    """Names, shapes and dtypes of a safetensors file, from its header alone."""
    from safetensors import SafetensorError, safe_open

    from sae_kernels.io.tensor_files import STORED_DTYPES

    names = {stored: str(dtype).removeprefix("torch.") for dtype, stored in STORED_DTYPES.items()}
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            tensors = {
                name: {"shape": s.get_shape(), "dtype": names.get(s.get_dtype(), s.get_dtype())}
                for name, s in slices.items()
            }
            return {"metadata": file.metadata() or {}, "tensors": tensors}
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{path}: expected a safetensors file, it cannot be read ({error}); restore it from a "
            "copy"
        ) from error


def _named(path: Path, files: "Mapping[str, Any]", suffix: str) -> list[str]:
    """Files of a manifest with this suffix, without names that lead out of the folder."""
    from sae_kernels.io.files import is_plain_name

    known = [name for name in files if is_plain_name(name) and name.endswith(suffix)]
    return [name for name in known if not (path / name).is_symlink()]


def _line(values: "Mapping[str, Any]") -> tuple[str, str, str]:
    """A row about one of a folder's SAEs or folders of activations."""
    if "error" in values:
        said = f"damaged: {values['error']}"
    elif "n_latents" in values:
        said = f"{values['architecture']}, {values['d_in']:,} to {values['n_latents']:,} latents"
    else:
        of = f" of {values['layer']}" if values["layer"] else ""
        said = f"{values['n_tokens']:,} rows [{values['d_in']:,}]{of}"
    return _plain(values["path"]), values["format"], _plain(said)


def _no(verify: bool) -> dict[str, str]:
    return {"verified": "nothing, the format has no checksums"} if verify else {}


def _rows(values: "Mapping[str, Any]") -> "Iterator[tuple[str, Any]]":
    """Rows of the table: all values that are not empty."""
    from sae_kernels.config.toml import flat

    for key, value in flat(values):
        if value is not None and value != []:
            yield key, ", ".join(map(str, value)) if isinstance(value, list) else value


def _plain(text: str) -> str:
    """Text without control characters: a stranger's file must not steer the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
