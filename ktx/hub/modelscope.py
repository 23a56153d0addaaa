"""ModelScope's hub, by its own client (modelscope-hub), which goes on with broken files by itself."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ktx.errors import BadFile, KtxError, UsageError
from ktx.hub.file_selection import File
from ktx.hub.listing import Listing, Plan
from ktx.utils.versions import install


class ModelScope:
    """MODELSCOPE_API_TOKEN is its token, MODELSCOPE_ENDPOINT another address. UsageError when the client is missing."""

    def __init__(self) -> None:
        os.environ.setdefault("TQDM_DISABLE", "1")  # its bars beside ours
        try:
            from modelscope_hub import HubApi, get_default_config
        except ImportError as error:
            raise UsageError(f"--hub modelscope needs its client: {install('modelscope')}") from error
        logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)
        self.api, self.cache = HubApi(), Path(get_default_config().cache_dir)

    def look(self, repo: str, revision: str | None) -> Listing:
        try:
            found = self.api.list_repo_files(repo, "model", revision=revision)
        except Exception as error:  # beside its own errors it lets those of its libraries through
            raise self.told(error, repo) from error
        files = tuple(File(one.path, one.size, one.sha256) for one in found if not one.is_dir)
        return Listing(repo, revision, revision or "master", files)

    def plan(self, listing: Listing, wanted: Sequence[File], to: Path | None) -> Plan:
        place = to or self.cache
        files = tuple(file for file in wanted if to is None or not _there(to / file.path, file))
        parts = [place / f"{file.path}.incomplete" for file in files if to is not None]
        return Plan(files, place, sum(part.stat().st_size for part in parts if part.exists()))

    def fetch(
        self, listing: Listing, wanted: Sequence[File], plan: Plan, to: Path | None, advance: Callable[[int], None]
    ) -> Path:
        from modelscope_hub import ProgressCallback

        class Told(ProgressCallback):
            def update(self, size: int) -> None:
                advance(size)

        entries = [{"Path": file.path, "Size": file.size, "Sha256": file.sha256} for file in wanted]
        try:
            return Path(
                self.api.download_repo(
                    listing.repo,
                    "model",
                    revision=listing.revision,
                    local_dir=to,
                    file_list=entries,
                    progress_callbacks=[Told],
                )
            )
        except Exception as error:
            raise self.told(error, listing.repo) from error

    def told(self, error: Exception, repo: str) -> KtxError:
        """What a user can do about an error of the client."""
        import modelscope_hub.errors as errors

        known: list[tuple[Any, type[KtxError], str]] = [
            (
                (errors.AuthenticationError, errors.PermissionDeniedError),
                BadFile,
                "ModelScope does not let you in: set MODELSCOPE_API_TOKEN to a token that may read it",
            ),
            (errors.NotExistError, BadFile, "ModelScope has no such repository or revision; check the name"),
            (errors.InvalidParameter, UsageError, "is no repository's name; write OWNER/NAME"),
        ]
        for kind, made, message in known:
            if isinstance(error, kind):
                return made(f"{repo}: {message}")
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        return KtxError(
            f"{repo}: {type(error).__name__}: {first[:200]}; the same command goes on where this one stopped"
        )


def _there(path: Path, file: File) -> bool:
    return path.is_file() and path.stat().st_size == file.size
