"""The ModelScope hub, through its own client (modelscope-hub), which resumes interrupted downloads itself."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ktx.errors import BadFile, KtxError, UsageError
from ktx.hub.file_selection import File
from ktx.hub.listing import DownloadPlan, Listing
from ktx.utils.versions import install_command


class ModelScope:
    """The ModelScope hub. MODELSCOPE_API_TOKEN is the access token, MODELSCOPE_ENDPOINT the URL of a mirror.

    Raises UsageError when the client is not installed.
    """

    def __init__(self) -> None:
        os.environ.setdefault("TQDM_DISABLE", "1")  # disables the client's progress bars
        try:
            from modelscope_hub import HubApi, get_default_config
        except ImportError as error:
            raise UsageError(f"--hub modelscope needs its client: {install_command('modelscope')}") from error
        logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)
        self.api, self.cache = HubApi(), Path(get_default_config().cache_dir)

    def list_repo(self, repo: str, revision: str | None) -> Listing:
        """Lists a repository's files with their sizes and digests. Raises KtxError with a remedy."""
        try:
            found = self.api.list_repo_files(repo, "model", revision=revision)
        except Exception as error:  # the client also raises its libraries' errors
            raise self.to_ktx_error(error, repo) from error
        files = tuple(File(one.path, one.size, one.sha256) for one in found if not one.is_dir)
        return Listing(repo, revision, revision or "master", files)

    def plan(self, listing: Listing, wanted: Sequence[File], local_dir: Path | None) -> DownloadPlan:
        """Returns which files are still to be downloaded, and how many bytes of them are on disk already.

        Without `local_dir` all files count, because only the client knows what its cache contains.
        """
        place = local_dir or self.cache
        files = tuple(file for file in wanted if local_dir is None or not _is_complete(local_dir / file.path, file))
        parts = [place / f"{file.path}.incomplete" for file in files if local_dir is not None]
        return DownloadPlan(files, place, sum(part.stat().st_size for part in parts if part.exists()))

    def fetch(
        self,
        listing: Listing,
        wanted: Sequence[File],
        plan: DownloadPlan,
        local_dir: Path | None,
        advance: Callable[[int], None],
    ) -> Path:
        """Downloads the files, to the folder `local_dir` or the client's cache; returns the folder.

        `advance` is called with the bytes that arrived.
        """
        from modelscope_hub import ProgressCallback

        class Progress(ProgressCallback):
            def update(self, size: int) -> None:
                advance(size)

        entries = [{"Path": file.path, "Size": file.size, "Sha256": file.sha256} for file in wanted]
        try:
            return Path(
                self.api.download_repo(
                    listing.repo,
                    "model",
                    revision=listing.revision,
                    local_dir=local_dir,
                    file_list=entries,
                    progress_callbacks=[Progress],
                )
            )
        except Exception as error:
            raise self.to_ktx_error(error, listing.repo) from error

    def to_ktx_error(self, error: Exception, repo: str) -> KtxError:
        """Converts an error of the client to a KtxError with a remedy, which commands print as one line."""
        import modelscope_hub.errors as errors

        known: list[tuple[Any, type[KtxError], str]] = [
            (
                (errors.AuthenticationError, errors.PermissionDeniedError),
                BadFile,
                "ModelScope denies access: set MODELSCOPE_API_TOKEN to a token that may read the repository",
            ),
            (errors.NotExistError, BadFile, "ModelScope has no such repository or revision; check the name"),
            (errors.InvalidParameter, UsageError, "is not a valid repository name; expected OWNER/NAME"),
        ]
        for kind, ktx_error, message in known:
            if isinstance(error, kind):
                return ktx_error(f"{repo}: {message}")
        first_line = next((line for line in str(error).splitlines() if line.strip()), "")
        return KtxError(f"{repo}: {type(error).__name__}: {first_line[:200]}; the same command resumes the download")


def _is_complete(path: Path, file: File) -> bool:
    return path.is_file() and path.stat().st_size == file.size
