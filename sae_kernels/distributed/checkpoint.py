"""Checkpoints and SAE files of a run on several ranks, without gathering them on one.

Rows of latents go through torch.distributed.checkpoint: each rank writes its own to safetensors
files, and reads those that are its own now from whatever files hold them, those of one process too.
What all ranks have alike rank 0 writes as one process does, and the manifest of all files.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Shard

from sae_kernels.io.files import digest, sync
from sae_kernels.nn import build, pretrained
from sae_kernels.runs import checkpoint
from sae_kernels.runs.checkpoint import Contents
from sae_kernels.runs.saver import Saver
from sae_kernels.runs.staging import Written, layout

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from sae_kernels.distributed.team import Team
    from sae_kernels.nn import SparseAutoencoder


def has_row_per_latent(sae: SparseAutoencoder, name: str) -> bool:
    """Whether a tensor of a checkpoint has a row for each latent: a weight, moment or counter."""
    if name == "dead.since_fired":
        return True
    parameter = name.removeprefix("adam.").removesuffix(".m").removesuffix(".v")
    return parameter in dict(sae.named_parameters()) and sae.has_row_per_latent(parameter)


class ShardSaver(Saver):
    """Saves checkpoints in the background, each rank its own rows.

    Args:
        team: all of which save the same step.
        sae: the part of the SAE that is here.
        parent, keep, last: as of Saver; ``parent`` is rank 0's.
    """

    def __init__(
        self, team: Team, sae: SparseAutoencoder, parent: Path, keep: int, last: int | None = None
    ) -> None:
        super().__init__(parent, keep, last)
        self._team, self._sae = team, sae
        self._rows: dict[str, torch.Tensor] = {}

    def save(self, step: int, contents: Contents) -> None:
        """Waits for the previous write, copies the state and starts to write it."""
        self.wait()  # before the copies that it writes are overwritten
        alike: dict[str, dict[str, torch.Tensor]] = {}
        for file, tensors in contents.tensors.items():
            alike[file] = {}
            for name, tensor in tensors.items():
                if has_row_per_latent(self._sae, name):
                    copy = self._rows.setdefault(name, torch.empty_like(tensor, device="cpu"))
                    copy.copy_(tensor)
                else:
                    alike[file][name] = tensor
        super().save(step, Contents(alike, contents.values))

    def _publish(self, step: int, values: Mapping[str, Mapping[str, Any]]) -> None:
        def lead(everywhere: Callable[[Path], list[dict[str, Written]]]) -> None:
            def others(partial: Path) -> dict[str, Written]:
                return {name: one for files in everywhere(partial) for name, one in files.items()}

            checkpoint.write(self.parent, step, self._staged, values, others)
            checkpoint.retain(self.parent, step, self.keep)

        self._team.write(self._write_rows, lead, self._team.saving)

    def _write_rows(self, partial: Path) -> dict[str, Written]:
        team = self._team
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        state = _placed(self._rows, self._sae.config.n_latents, team)
        save(state, storage_writer=writer, process_group=team.saving)
        mine = sorted(partial.glob(f"{checkpoint.SHARD}{team.rank + 1:05d}-*"))
        for path in mine:
            sync(path)
        return {path.name: Written(path.stat().st_size, digest(path)) for path in mine}


def read_part(path: Path, team: Team, sae: SparseAutoencoder) -> dict[str, torch.Tensor]:
    """This rank's rows of all tensors of a checkpoint or an SAE's folder, and all others whole.

    Args:
        path: the folder, verified.
        team: all of which read it.
        sae: the part of the SAE, whose rows are read; may be on the meta device.
    """
    reader = HuggingFaceStorageReader(str(path))
    found: dict[str, torch.Tensor] = {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        if has_row_per_latent(sae, name):
            shape = (len(sae.latents), *stored.size[1:])  # type: ignore[union-attr]
            found[name] = torch.empty(shape, dtype=stored.properties.dtype)  # type: ignore[union-attr]
    load(
        _placed(found, sae.config.n_latents, team),
        storage_reader=reader,
        process_group=team.saving,
    )
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored_file:
            for name in set(stored_file.keys()) - found.keys():
                found[name] = stored_file.get_tensor(name)
    return found


def load_sae(path: Path, team: Team, latents: range) -> SparseAutoencoder:
    """This rank's part of a saved SAE, on the CPU.

    Raises:
        DataError: files missing or damaged, or an unknown architecture.
    """
    config, metadata = pretrained.describe(path / pretrained.CONFIG_FILE)
    with torch.device("meta"):
        sae = build(config, latents=latents)
    read = read_part(path, team, sae)
    sae.load_state_dict({name: read[name] for name in sae.state_dict()}, assign=True)
    sae.metadata = metadata
    return sae


def save_sae(sae: SparseAutoencoder, folder: Path, team: Team) -> None:
    """Writes the whole SAE as ``save_pretrained`` does; each rank puts its rows into the file."""
    folded = sae.folded()
    weights = {name: t.detach().cpu().contiguous() for name, t in folded.state_dict().items()}
    split = {name for name in weights if has_row_per_latent(folded, name)}
    F = folded.config.n_latents
    shapes = {
        n: (t.dtype, (F, *t.shape[1:]) if n in split else t.shape) for n, t in weights.items()
    }
    head, places = layout(shapes)

    def own(path: Path) -> None:
        with path.open("r+b") as file:
            for name in weights if team.rank == 0 else split:
                rows, whole = weights[name], places[name]
                row = (whole.stop - whole.start) // F if name in split else 0
                file.seek(whole.start + sae.latents.start * row)
                file.write(memoryview(rows.reshape(-1).view(torch.uint8).numpy()))
            file.flush()
            os.fsync(file.fileno())

    def lead(everywhere: Callable[[Path], list[None]]) -> None:
        def write_weights(path: Path) -> None:
            path.write_bytes(head)
            os.truncate(path, max(place.stop for place in places.values()))
            everywhere(path)

        pretrained.save(folded, folder, write_weights=write_weights)

    team.write(own, lead)


def _placed(rows: Mapping[str, torch.Tensor], n_latents: int, team: Team) -> dict[str, Any]:
    """Rows of latents as what torch.distributed.checkpoint knows the place of."""
    return {
        name: DTensor.from_local(
            t,
            team.saving_mesh,
            [Shard(0)],
            run_check=False,
            shape=torch.Size((n_latents, *t.shape[1:])),
            stride=t.stride(),
        )
        for name, t in rows.items()
    }
