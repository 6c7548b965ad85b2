"""The folder of a run on several ranks: rank 0 keeps it, all write their rows of checkpoints."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_kernels.distributed.checkpoint import ShardSaver, load_sae, read_part, save_sae
from sae_kernels.io.files import read_json
from sae_kernels.runs import checkpoint
from sae_kernels.runs.folder import SAE_FOLDER, RunFolder

if TYPE_CHECKING:
    from typing_extensions import Self

    from sae_kernels.config.output import OutputConfig
    from sae_kernels.config.toml import Tables
    from sae_kernels.distributed.team import Team
    from sae_kernels.nn import SparseAutoencoder


class TeamFolder(RunFolder):
    """:class:`~sae_kernels.runs.folder.RunFolder` of ranks, which call it at the same steps.

    Only rank 0 locks it, logs and writes settings; saving and reading checkpoints and the SAE is
    done by all, which must see one file system.

    Args:
        team: the ranks.
        like: an SAE with the latents of this rank; may be on the meta device.
        path, tables, options, arguments: as of RunFolder.
    """

    shared = True

    def __init__(
        self,
        team: Team,
        like: SparseAutoencoder,
        path: str | Path,
        tables: Tables,
        options: OutputConfig,
        **arguments: Any,
    ) -> None:
        saver = functools.partial(ShardSaver, team, like)
        read = checkpoint.read_values
        super().__init__(path, tables, options, **arguments, saver=saver, read=read)
        self._team, self._like = team, like

    def __enter__(self) -> Self:
        with self._team.together():
            if self._team.rank == 0:
                super().__enter__()
        found = self._team.told(None if self.checkpoint is None else str(self.checkpoint))
        if self._team.rank:
            if found is not None:
                self.checkpoint, self.step = Path(found), checkpoint.step_of(Path(found))
            with ExitStack() as stack:
                keep = self.options.keep_checkpoints
                saver = self._make_saver(self._checkpoints, keep, self.step or None)
                self._saver = stack.enter_context(saver)
                self._stack = stack.pop_all()
        return self

    def pop_contents(self) -> checkpoint.Contents:
        """The checkpoint's contents: of tensors with a row per latent this rank's rows."""
        assert self.checkpoint is not None
        path, self._contents = self.checkpoint, None
        tensors = read_part(path, self._team, self._like)
        alike = [
            p.name for p in path.glob("*.safetensors") if not p.name.startswith(checkpoint.SHARD)
        ]
        names = [p.name for p in path.glob("*.json") if p.name != checkpoint.MANIFEST]
        values = {name: read_json(path / name) for name in names}
        return checkpoint.Contents(dict.fromkeys(alike, tensors), values)

    def log(self, line: dict[str, Any]) -> None:
        """Appends a metric line; rank 0's goes to the file and the loggers."""
        if self._team.rank == 0:
            super().log(line)
        else:
            self.lines.append(line)

    def due(self, step: int) -> bool:
        """Whether to save a checkpoint after this step; a failed save is raised by the next."""
        every = self.options.checkpoint_every
        return every > 0 and step % every == 0

    def save(self, step: int, contents: checkpoint.Contents, *, wait: bool = False) -> None:
        """Writes a checkpoint in the background; ``wait`` returns only when it is on the disk."""
        self.wait()  # until then ranks may differ in what the last one is
        if self._saver.last != step:
            if self._team.rank == 0:
                self._log.sync()
            self._saver.save(step, contents)
        if wait:
            self.wait()

    def load_sae(self) -> SparseAutoencoder:
        """This rank's part of the SAE of the checkpoint to continue from."""
        assert self.checkpoint is not None
        return load_sae(self.checkpoint, self._team, self._like.latents)

    def save_sae(self, sae: SparseAutoencoder) -> None:
        """Saves the whole SAE in the folder, each rank its rows."""
        save_sae(sae, self.path / SAE_FOLDER, self._team)

    def finish(self, result: dict[str, Any]) -> None:
        """Writes result.json, which marks the run as finished."""
        self.wait()
        if self._team.rank == 0:
            super().finish(result)
