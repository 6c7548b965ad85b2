"""RunConfig: all settings of a run, read from and written to TOML."""

from __future__ import annotations

import copy
import dataclasses
import typing
from typing import TYPE_CHECKING, Any

from sae_kernels.config.base import declared
from sae_kernels.config.data import DataConfig
from sae_kernels.config.optimizer import OptimizerConfig
from sae_kernels.config.output import OutputConfig
from sae_kernels.config.parallel import ParallelConfig
from sae_kernels.config.toml import read_tables, write_tables
from sae_kernels.config.train import TrainConfig
from sae_kernels.errors import name_hint
from sae_kernels.nn import Preset, architecture, architectures, nested_groups, preset, presets
from sae_kernels.nn.registry import Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from sae_kernels.config.base import Settings
    from sae_kernels.config.sae import SAEConfig
    from sae_kernels.config.toml import Tables

DEFAULT_ARCHITECTURE = "topk"
LATENTS_PER_INPUT = 8
NESTED_TABLES = ("objective", "optimizer")  # of a TrainConfig


def setting_classes() -> dict[str, list[type[Settings]]]:
    """The settings' classes of each table of a run's TOML file, of all architectures.

    A name means the same in all architectures that have it.
    """
    known = architectures().values()
    return {
        "data": [DataConfig],
        "sae": [sae.config_class for sae in known],
        "objective": [sae.objective_class for sae in known],
        "optimizer": [OptimizerConfig],
        "train": [TrainConfig],
        "output": [OutputConfig],
        "parallel": [ParallelConfig],
    }


def setting_names(table: str) -> list[str]:
    """Names of all settings that a table may have."""
    names = dict.fromkeys(
        field.name for cls in setting_classes()[table] for field in dataclasses.fields(cls)
    )
    return [name for name in names if table != "train" or name not in NESTED_TABLES]


class Widths(typing.NamedTuple):
    """Widths of the data: of each layer, and of a transcoder's target."""

    layers: list[int]
    targets: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All settings of a training run.

    As TOML each is a table. ``arch`` names a preset (docs/architectures.md), whose settings are the
    defaults; ``architecture`` names the class of SAE alone, as in the run.toml of a run's folder,
    which has every setting.

    Attributes:
        sae: settings of the SAE.
        train: settings of the training, with objective and optimizer.
        data: settings of the activations.
        output: settings of checkpoints and loggers.
        parallel: how several processes share it.

    Example:
        >>> config = RunConfig.from_tables({"sae": {"d_in": 8, "n_latents": 32, "k": 4}})
        >>> RunConfig.from_tables(config.to_tables()) == config
        True
    """

    sae: SAEConfig
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    output: OutputConfig = dataclasses.field(default_factory=OutputConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)

    def expect_one_process(self) -> None:
        """Raises ValueError for settings of a run on several processes."""
        if self.parallel != ParallelConfig():
            raise ValueError(
                "[parallel]: expected none, only `train` on stored activations runs on several "
                f"processes, got {self.parallel.to_table()}"
            )

    @classmethod
    def read(cls, path: Path, widths: Widths | None = None) -> RunConfig:
        """Reads the settings from a TOML file.

        Raises:
            DataError: no such file, or no TOML.
            ValueError: as :meth:`from_tables`.
        """
        return cls.from_tables(read_tables(path), widths)

    def write(self, path: Path) -> None:
        """Writes every setting as TOML, atomically."""
        write_tables(path, self.to_tables())

    def to_tables(self) -> Tables:
        """All settings as TOML tables."""
        return run_tables(self.sae, self.train, self.data.to_table(), self.output, self.parallel)

    @classmethod
    def from_tables(cls, tables: Tables, widths: Widths | None = None) -> RunConfig:
        """Settings from TOML tables; missing ones are the preset's, or the default.

        Args:
            tables: "arch" or "architecture", and the tables.
            widths: widths of the data, the default of d_in, d_out and n_layers.

        Raises:
            ValueError: an unknown table, key or architecture (the message suggests the nearest); a
                setting that the architecture lacks; a value out of range.
        """
        check_tables(tables)
        sae, train = dict(tables.get("sae", {})), dict(tables.get("train", {}))
        _one_scale(sae, train)
        return cls(
            _sae(tables, sae, widths),
            train_config(tables, train),
            DataConfig(**tables.get("data", {})),
            OutputConfig(**tables.get("output", {})),
            ParallelConfig(**tables.get("parallel", {})),
        )


def train_config(tables: Tables, train: Mapping[str, Any] | None = None) -> TrainConfig:
    """The settings of training with objective and optimizer, from TOML tables.

    Args:
        tables: as of :meth:`RunConfig.from_tables`; missing settings are the preset's.
        train: replaces the table [train].
    """
    kind = kind_of(tables)
    objective = {**kind.preset.objective, **tables.get("objective", {})}
    _check_known("objective", kind.sae.objective_class, objective, _name(tables))
    optimizer = {**kind.preset.optimizer, **tables.get("optimizer", {})}
    return TrainConfig(
        **(tables.get("train", {}) if train is None else train),
        objective=kind.sae.objective_class(**objective),
        optimizer=OptimizerConfig(**optimizer),
    )


def run_tables(
    sae: SAEConfig,
    train: TrainConfig,
    data: Mapping[str, Any],
    output: OutputConfig,
    parallel: ParallelConfig,
) -> Tables:
    """The TOML tables with every setting that repeats a run."""
    objective = train.objective or architecture(sae.architecture).objective_class()
    return {
        "architecture": sae.architecture,
        "data": dict(data),
        "sae": sae.to_table(),
        "objective": objective.to_table(),
        "optimizer": train.optimizer.to_table(),
        "train": train.to_table(),
        "output": output.to_table(),
        "parallel": parallel.to_table(),
    }


def run_defaults(sae: SAEConfig) -> dict[str, Any]:
    """The default of every setting by its dotted key, as "train.lr"."""
    tables = {
        "sae": type(sae),
        "objective": architecture(sae.architecture).objective_class,
        "optimizer": OptimizerConfig,
        "train": TrainConfig,
        "parallel": ParallelConfig,
    }
    return {
        f"{table}.{field.name}": field.default
        for table, cls in tables.items()
        for field in dataclasses.fields(cls)
        if field.default is not dataclasses.MISSING
    }


def merged(below: Tables, above: Tables) -> Tables:
    """Merges two sets of tables; values of ``above`` take precedence.

    Example:
        >>> merged({"arch": "topk", "sae": {"k": 2, "d_in": 8}}, {"sae": {"k": 4}})
        {'arch': 'topk', 'sae': {'k': 4, 'd_in': 8}}
    """
    result = copy.deepcopy(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else copy.deepcopy(value)
    for one, other in (("arch", "architecture"), ("architecture", "arch")):
        if one in above and other not in above:  # the two exclude each other
            result.pop(other, None)
    return result


def kind_of(tables: Tables) -> Kind:
    """Class and preset that the tables name; ``architecture`` has an empty preset."""
    if "architecture" not in tables:
        return preset(tables.get("arch", DEFAULT_ARCHITECTURE))
    if "arch" in tables:
        raise ValueError("arch: expected arch (a preset) or architecture (a kind), got both")
    name = tables["architecture"]
    return Kind(architecture(name), Preset(str(name)))


def _name(tables: Tables) -> str:
    """The architecture's name in the tables."""
    return str(tables.get("arch", tables.get("architecture", DEFAULT_ARCHITECTURE)))


def check_tables(tables: Tables, also: Iterable[str] = ()) -> None:
    """Raises ValueError for unknown tables and keys, and values in place of tables."""
    settings = {table: setting_names(table) for table in setting_classes()}
    _refuse_unknown("unknown table", tables, ("arch", "architecture", *settings, *also))
    for name, known in (("arch", presets()), ("architecture", architectures())):
        if name in tables and not isinstance(tables[name], str):
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {tables[name]!r}")
    for table, own in settings.items():
        values = tables.get(table, {})
        if not isinstance(values, dict):
            raise ValueError(f"expected a table [{table}], got {values!r}")
        for key in values:
            owner = next((other for other, names in settings.items() if key in names), None)
            if key not in own and owner is not None:
                raise ValueError(f"[{table}]: unknown key {key!r}; it belongs in [{owner}]")
        _refuse_unknown(f"[{table}]: unknown key", values, own)


def _refuse_unknown(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for name in given:
        if name not in known:
            raise ValueError(f"{what} {name!r}; {name_hint(name, known)}")


def _one_scale(sae: dict[str, Any], train: dict[str, Any]) -> None:
    """Turns the estimate of the activation scale off if the SAE has one; refuses both."""
    if "activation_scale" not in sae:
        return
    estimated = train.setdefault("normalize_activations", "none") != "none"
    if estimated and sae["activation_scale"] != 1:
        raise ValueError(
            f"activation_scale: expected the SAE's own {sae['activation_scale']} or an estimate, "
            "got both; leave it out, or set normalize_activations to none"
        )


def _sae(tables: Tables, given: dict[str, Any], widths: Widths | None) -> SAEConfig:
    kind = kind_of(tables)
    config_class, own = kind.sae.config_class, kind.preset.sae
    _check_known("sae", config_class, given, _name(tables))
    values = {**(_of_data(widths) if widths else {}), **own, **given}
    for key in ("d_in", "n_latents"):
        if key not in values:
            raise ValueError(f"[sae]: {key}: expected a number, as no data say it; set it")
    values = {key: _typed(config_class, key, value) for key, value in values.items()}
    if "groups" in own and values["groups"] == own["groups"]:
        values["groups"] = nested_groups(values["n_latents"])
    return config_class(**values)


def _check_known(table: str, cls: type[Settings], given: Iterable[str], name: str) -> None:
    """Raises ValueError for settings that this architecture lacks."""
    known = [field.name for field in dataclasses.fields(cls)]
    for key in given:
        if key not in known:
            what = f"architecture {name!r}" if table == "sae" else f"the objective of {name!r}"
            raise ValueError(f"{key}: no setting of {what}, which has {', '.join(known)}")


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
    if widths.targets:
        if len(set(widths.targets)) > 1:
            raise ValueError(
                f"expected targets of one width, got {list(widths.targets)}; a transcoder writes "
                "layers of one d_out"
            )
        values["d_out"] = widths.targets[0]
    return values


def _typed(config: type[SAEConfig], name: str, value: Any) -> Any:
    """A value in the type of its field, from a flag or TOML, which lack ints and tuples."""
    said = declared(config)[name]
    whole = said.kind is int and not said.optional
    if whole and isinstance(value, float) and value.is_integer():
        return int(value)
    return said.typed(value)
