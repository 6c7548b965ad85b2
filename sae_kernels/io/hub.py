"""Listing and downloading files of repositories on the Hugging Face hub."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sae_kernels.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class HubPlace(NamedTuple):
    """A repository on the hub and a folder (or a file) in it.

    Attributes:
        repository: ``owner/repo``.
        inside: path in the repository; empty for its root.
    """

    repository: str
    inside: str

    @classmethod
    def of(cls, name: str) -> HubPlace | None:
        """Parses ``owner/repo`` or ``owner/repo/folder``; None for a path on disk."""
        if name.startswith((".", "~")) or Path(name).is_absolute() or name.count("/") < 1:
            return None
        owner, repository, *inside = name.rstrip("/").split("/")
        return cls(f"{owner}/{repository}", "/".join(inside))


@contextmanager
def _asking(repository: str) -> Iterator[None]:
    """Turns errors of the hub client into a DataError of one line."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    refusals = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError)
    # A hub that cannot be reached: an error of the HTTP library, which differs by version.
    caught: tuple[type[Exception], ...] = (
        *refusals,
        *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)),
    )
    try:
        yield
    except caught as error:
        said = str(error).strip().splitlines()
        reason = said[0] if said else type(error).__name__
        raise DataError(
            f"{repository}: no such folder, and the Hugging Face hub did not give it ({reason})"
        ) from error


class Listing(NamedTuple):
    """The files of a repository at a commit.

    Attributes:
        commit: the commit; downloads by it are consistent with each other.
        files: the paths of all files.
    """

    commit: str
    files: list[str]


def listing(repository: str, revision: str | None = None) -> Listing:
    """Asks the hub for the commit and files of a repository.

    Raises:
        DataError: the hub cannot be reached, or has no such repository or revision.
    """
    import huggingface_hub

    with _asking(repository):
        info = huggingface_hub.HfApi().model_info(repository, revision=revision)
    return Listing(info.sha or revision or "main", [f.rfilename for f in info.siblings or []])


def cached_folder(repository: str, revision: str | None = None) -> Path:
    """The folder of a repository in the local cache, without asking the hub.

    Raises:
        DataError: the repository is not cached.
    """
    import huggingface_hub

    with _asking(repository):
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision, local_files_only=True
        )
    return Path(folder)


def download(
    repository: str,
    files: Iterable[str],
    revision: str | None = None,
    local_files_only: bool = False,
) -> list[Path]:
    """Downloads files of a repository, or finds them in the cache; returns their paths in order.

    Args:
        repository: ``owner/repo``.
        files: paths inside it.
        revision: a branch, a tag or a commit; None is the newest.
        local_files_only: use the cache alone and never ask the hub.

    Raises:
        DataError: a file is not available, with the hub's reason.
    """
    import huggingface_hub

    with _asking(repository):
        paths = [
            huggingface_hub.hf_hub_download(
                repository, file, revision=revision, local_files_only=local_files_only
            )
            for file in files
        ]
    return [Path(path) for path in paths]
