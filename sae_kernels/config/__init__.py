"""Settings of SAEs, training steps and runs, checked and written as TOML."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_kernels.config.base import Settings
    from sae_kernels.config.data import DataConfig
    from sae_kernels.config.objective import ObjectiveConfig
    from sae_kernels.config.optimizer import OptimizerConfig
    from sae_kernels.config.output import OutputConfig
    from sae_kernels.config.parallel import ParallelConfig
    from sae_kernels.config.row_filter import RowFilter
    from sae_kernels.config.sae import SAEConfig
    from sae_kernels.config.train import TrainConfig

__all__ = [
    "DataConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "OutputConfig",
    "ParallelConfig",
    "RowFilter",
    "SAEConfig",
    "Settings",
    "TrainConfig",
]


def __getattr__(name: str) -> Any:
    """Imports a class from its module when it is first asked for: a step needs few of them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = {"Settings": "base", "RowFilter": "row_filter"}.get(
        name, name.removesuffix("Config").lower()
    )
    return getattr(import_module(f"{__name__}.{module}"), name)
