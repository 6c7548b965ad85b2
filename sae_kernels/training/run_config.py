"""All settings of a run as one tree, from TOML and to it."""

from __future__ import annotations

import copy
import dataclasses
import typing
from typing import TYPE_CHECKING, Any

from sae_kernels.config.data import DataConfig
from sae_kernels.config.output import OutputConfig
from sae_kernels.config.tables import read_tables, write_tables
from sae_kernels.config.train import TrainConfig
from sae_kernels.errors import name_hint
from sae_kernels.nn import CONFIGS, SAEConfig
from sae_kernels.training.presets import PRESETS, Preset, nested_groups, preset

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from sae_kernels.config.tables import Tables

# Every setting there is, by table: the class that describes it and its field. Architectures share
# most of theirs; a name means the same in all.
FIELDS: dict[str, dict[str, tuple[type, dataclasses.Field[Any]]]] = {
    "data": {f.name: (DataConfig, f) for f in dataclasses.fields(DataConfig)},
    "sae": {f.name: (c, f) for c in CONFIGS.values() for f in dataclasses.fields(c)},
    "train": {f.name: (TrainConfig, f) for f in dataclasses.fields(TrainConfig)},
    "output": {f.name: (OutputConfig, f) for f in dataclasses.fields(OutputConfig)},
}
DEFAULT_ARCHITECTURE = "topk"
LATENTS_PER_INPUT = 8


class Widths(typing.NamedTuple):
    """What the data says about an SAE: the width of each layer, and of a transcoder's target."""

    layers: list[int]
    target: int | None = None


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A run: what is trained, how, on what, and what is written meanwhile.

    As TOML each is a table. ``arch`` names a preset (docs/architectures.md), whose settings count
    where the file has none; a file with ``architecture`` in its place names the kind of SAE alone:
    run.toml in a run's folder, which has every setting, is of that kind.

    Attributes:
        sae: the SAE.
        train: the training.
        data: the activations.
        output: checkpoints and loggers.

    Example:
        >>> config = RunConfig.from_tables({"sae": {"d_in": 8, "n_latents": 32, "k": 4}})
        >>> RunConfig.from_tables(config.to_tables()) == config
        True
    """

    sae: SAEConfig
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    output: OutputConfig = dataclasses.field(default_factory=OutputConfig)

    @classmethod
    def read(cls, path: Path, widths: Widths | None = None) -> RunConfig:
        """The settings of a TOML file.

        Raises:
            DataError: no such file, or no TOML.
            ValueError: as :meth:`from_tables`.
        """
        return cls.from_tables(read_tables(path), widths)

    def write(self, path: Path) -> None:
        """Writes every setting as TOML, whole or not at all."""
        write_tables(path, self.to_tables())

    def to_tables(self) -> Tables:
        """The tables of the TOML file."""
        return run_tables(self.sae, self.train, self.data.to_dict(), self.output)

    @classmethod
    def from_tables(cls, tables: Tables, widths: Widths | None = None) -> RunConfig:
        """The settings of TOML tables; what they leave out is the preset's, or the default.

        Args:
            tables: "arch" or "architecture", and the tables.
            widths: of the data, for an SAE that does not say its own.

        Raises:
            ValueError: an unknown table, key or architecture, with the nearest that is known; a
                setting that the architecture does not have; a value that does not fit.
        """
        check_tables(tables)
        chosen = kind_of(tables)
        sae, train = dict(tables.get("sae", {})), dict(tables.get("train", {}))
        _one_scale(sae, train)
        sae_config = _sae(chosen, sae, widths, tables.get("arch", tables.get("architecture")))
        return cls(
            sae_config,
            TrainConfig(**{**chosen.train, **train}),
            DataConfig(**tables.get("data", {})),
            OutputConfig(**tables.get("output", {})),
        )


def run_tables(
    sae: SAEConfig, train: TrainConfig, data: Mapping[str, Any], output: OutputConfig
) -> Tables:
    """Everything that repeats a run."""
    return {
        "architecture": sae.architecture,
        "data": dict(data),
        "sae": sae.to_dict(),
        "train": train.to_dict(),
        "output": dataclasses.asdict(output),
    }


def run_defaults(sae: SAEConfig) -> dict[str, Any]:
    """The default of every setting, by the name that a comparison gives it."""
    tables = {"sae": type(sae), "train": TrainConfig}
    return {
        f"{table}.{field.name}": field.default
        for table, cls in tables.items()
        for field in dataclasses.fields(cls)
        if field.default is not dataclasses.MISSING
    }


def merged(below: Tables, above: Tables) -> Tables:
    """Tables of which the second ones count where both say something.

    Example:
        >>> merged({"arch": "topk", "sae": {"k": 2, "d_in": 8}}, {"sae": {"k": 4}})
        {'arch': 'topk', 'sae': {'k': 4, 'd_in': 8}}
    """
    result = copy.deepcopy(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else copy.deepcopy(value)
    for one, other in (("arch", "architecture"), ("architecture", "arch")):
        if one in above and other not in above:  # a preset and a bare kind rule each other out
            result.pop(other, None)
    return result


def kind_of(tables: Tables) -> Preset:
    """The preset that tables name; of ``architecture`` one without settings of its own."""
    if "architecture" not in tables:
        return preset(tables.get("arch", DEFAULT_ARCHITECTURE))
    if "arch" in tables:
        raise ValueError("arch: expected arch (a preset) or architecture (a kind), got both")
    name = tables["architecture"]
    if name not in CONFIGS:
        raise ValueError(f"architecture: got {name!r}; {name_hint(str(name), CONFIGS)}")
    return Preset(CONFIGS[name], name)


def check_tables(tables: Tables, also: Iterable[str] = ()) -> None:
    """Raises ValueError for unknown tables and keys, and for what is no table."""
    _refuse_unknown("unknown table", tables, ("arch", "architecture", *FIELDS, *also))
    for name, known in (("arch", list(PRESETS)), ("architecture", list(CONFIGS))):
        if name in tables and not isinstance(tables[name], str):
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {tables[name]!r}")
    for table in FIELDS:
        values = tables.get(table, {})
        if not isinstance(values, dict):
            raise ValueError(f"expected a table [{table}], got {values!r}")
        _refuse_unknown(f"[{table}]: unknown key", values, FIELDS[table])


def _refuse_unknown(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for name in given:
        if name not in known:
            raise ValueError(f"{what} {name!r}; {name_hint(name, known)}")


def _one_scale(sae: dict[str, Any], train: dict[str, Any]) -> None:
    """An SAE's own scale rules its estimate out."""
    if "activation_scale" not in sae:
        return
    if train.setdefault("activation_scale", "none") != "none" and sae["activation_scale"] != 1:
        raise ValueError(
            f"activation_scale: expected the SAE's own {sae['activation_scale']} or an estimate, "
            "got both; leave out one of them, or set the one of [train] to none"
        )


def _sae(
    chosen: Preset, given: dict[str, Any], widths: Widths | None, name: str | None
) -> SAEConfig:
    known = [field.name for field in dataclasses.fields(chosen.config)]
    for key in given:
        if key not in known:
            raise ValueError(
                f"{key}: no setting of architecture {name or DEFAULT_ARCHITECTURE!r}, which has "
                f"{', '.join(known)}"
            )
    values = {**(_of_data(widths) if widths else {}), **chosen.sae, **given}
    for key in ("d_in", "n_latents"):
        if key not in values:
            raise ValueError(f"[sae]: {key}: expected a number, as no data say it; set it")
    values = {key: _typed(chosen.config, key, value) for key, value in values.items()}
    if "groups" in chosen.sae and values["groups"] == chosen.sae["groups"]:
        values["groups"] = nested_groups(values["n_latents"])
    return chosen.config(**values)


def _of_data(widths: Widths) -> dict[str, Any]:
    if len(set(widths.layers)) > 1:
        raise ValueError(
            f"expected layers of one width, got {widths.layers}; a crosscoder reads layers of one "
            "d_in"
        )
    d_in = widths.layers[0]
    values = {"d_in": d_in, "n_latents": LATENTS_PER_INPUT * d_in}
    if len(widths.layers) > 1:
        values["n_layers"] = len(widths.layers)
    if widths.target is not None:
        values["d_out"] = widths.target
    return values


def _typed(config: type, name: str, value: Any) -> Any:
    """A value as the field has it: flags know one type a name, and TOML no tuples."""
    kind = typing.get_type_hints(config)[name]
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return _groups(value) if name == "groups" else value


def _groups(value: Any) -> tuple[int, ...] | None:
    if value is None or isinstance(value, (list, tuple)):
        return value if value is None else tuple(value)
    try:
        return tuple(int(part) for part in value.split(","))
    except (AttributeError, ValueError) as error:
        raise ValueError(f"groups: expected sizes such as 512,512,1024, got {value!r}") from error
