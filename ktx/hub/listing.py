"""The interface of hub clients: `Listing`, `DownloadPlan` and the protocol `Hub`. No network access."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ktx.hub.file_selection import File


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one revision."""

    repo: str
    requested_revision: str | None  # the branch, tag or commit that the user requested
    revision: str  # what it resolves to: a commit if the hub has commits
    files: tuple[File, ...]


@dataclass(frozen=True)
class DownloadPlan:
    """The selected files that are not on disk yet."""

    files: tuple[File, ...]
    target_folder: Path  # the target folder, which may not exist yet
    downloaded_bytes: int  # bytes of `files` that an interrupted download has already stored

    @property
    def total_bytes(self) -> int:
        """The size of `files` in bytes."""
        return sum(file.size for file in self.files)


class Hub(Protocol):
    """A hub client; each method raises a KtxError with a remedy."""

    def list_repo(self, repo: str, revision: str | None) -> Listing:
        """Lists the files of a repository; the default branch when `revision` is None."""
        ...

    def plan(self, listing: Listing, wanted: Sequence[File], local_dir: Path | None) -> DownloadPlan:
        """Plans the download of the `wanted` files to folder `local_dir`, or to the hub's cache when it is None."""
        ...

    def fetch(
        self,
        listing: Listing,
        wanted: Sequence[File],
        plan: DownloadPlan,
        local_dir: Path | None,
        advance: Callable[[int], None],
    ) -> Path:
        """Downloads the planned files and returns the folder that contains all wanted files.

        `advance` is called with the number of bytes received since its last call.
        """
        ...
