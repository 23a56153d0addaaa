"""What a hub says of a repository, and what a hub can do. No network here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ktx.hub.file_selection import File


@dataclass(frozen=True)
class Listing:
    """A repository at one revision."""

    repo: str
    asked: str | None  # the branch, tag or commit that the user named
    revision: str  # what that is now: a commit where the hub has them
    files: tuple[File, ...]


@dataclass(frozen=True)
class Plan:
    """What of the wanted files is to be fetched, of how many bytes, and how many of those came in an earlier try."""

    files: tuple[File, ...]
    place: Path  # a folder, perhaps not there yet, of the disk that they go to
    began: int

    @property
    def total(self) -> int:
        return sum(file.size for file in self.files)


class Hub(Protocol):
    """A hub; each method raises a KtxError whose message says what to do."""

    def look(self, repo: str, revision: str | None) -> Listing: ...

    def plan(self, listing: Listing, wanted: Sequence[File], to: Path | None) -> Plan: ...

    def fetch(
        self, listing: Listing, wanted: Sequence[File], plan: Plan, to: Path | None, advance: Callable[[int], None]
    ) -> Path:
        """The folder that then holds all wanted files; `advance` hears of bytes as they come."""
        ...
