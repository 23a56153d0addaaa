"""The Hugging Face hub, or a mirror (HF_ENDPOINT), with resumable downloads of large files.

huggingface_hub lists repositories, authenticates and manages the cache. Since its second version it restarts an
interrupted file from the beginning, which costs hours for a file of 40 GB. So large files are downloaded here, with its
own `http_get`, into a persistent partial file that is then moved to where the library expects it.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ktx.errors import BadFile, KtxError, UsageError
from ktx.hub.file_selection import File
from ktx.hub.listing import DownloadPlan, Listing

WORKERS = 4  # concurrent downloads
CHUNK_BYTES = 1 << 20  # bytes written at once; an interrupted download loses at most this much
NO_PROGRESS_MAX_BYTES = 10_000_000  # the library downloads files up to this size without a progress bar


class HuggingFace:
    """The Hugging Face hub. HF_TOKEN, or the token stored by `hf auth login`, is sent only to the hub."""

    def __init__(self) -> None:
        from huggingface_hub import constants
        from huggingface_hub.utils import disable_progress_bars, logging

        logging.set_verbosity_error()
        disable_progress_bars()
        constants.DOWNLOAD_CHUNK_SIZE = CHUNK_BYTES
        self.endpoint, self.largest = constants.ENDPOINT, constants.MAX_HTTP_DOWNLOAD_SIZE
        self.cache = Path(constants.HF_HUB_CACHE)

    def list_repo(self, repo: str, revision: str | None) -> Listing:
        """Lists a repository's files at one commit, with sizes and the digests of large ones.

        Raises KtxError with a remedy.
        """
        from huggingface_hub import HfApi

        try:
            info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=30)
        except Exception as error:  # the hub client's errors have no common base but Exception
            raise self.to_ktx_error(error, repo, revision) from error
        files = tuple(
            File(one.rfilename, one.size or 0, one.lfs.sha256 if one.lfs else None) for one in info.siblings or ()
        )
        return Listing(repo, revision, info.sha or revision or "main", files)

    def plan(self, listing: Listing, wanted: Sequence[File], to: Path | None) -> DownloadPlan:
        """Returns which files are still to be downloaded, and how many bytes of them are on disk already.

        Raises KtxError if the hub denies access, before anything is downloaded.
        """
        place = to or self.cache
        if to is not None and not to.exists():  # a dry run of the library would create the folder
            self._check_access(listing, wanted[-1])
            missing = {file.path for file in wanted}
        else:
            missing = {
                one.filename
                for one in self._snapshot(listing, listing.revision, wanted, to, dry_run=True)
                if one.will_download
            }
        files = tuple(file for file in wanted if file.path in missing)
        parts = (_partial_path(self._target(listing, file, to), file) for file in files if self._is_ours(file))
        return DownloadPlan(files, place, sum(part.stat().st_size for part in parts if part.exists()))

    def fetch(
        self,
        listing: Listing,
        wanted: Sequence[File],
        plan: DownloadPlan,
        to: Path | None,
        advance: Callable[[int], None],
    ) -> Path:
        """Downloads the files, to the folder `to` or the library's cache; returns the folder.

        Large files are downloaded here, several at once, because the library cannot resume after a broken connection;
        it downloads the others. `advance` is called with the bytes that arrived.
        """
        from huggingface_hub.utils import enable_progress_bars

        large = list({self._target(listing, file, to): file for file in plan.files if self._is_ours(file)}.values())
        if any(file.size > NO_PROGRESS_MAX_BYTES and file not in large for file in plan.files):
            enable_progress_bars()
        stop = threading.Event()
        try:
            _fetch_all(large, lambda file: self._fetch_file(listing, file, to, advance, stop), stop)
        except KtxError:
            raise
        except Exception as error:
            raise self.to_ktx_error(error, listing.repo, listing.revision) from error
        # With the branch's name and not the commit, because the library stores the name for later offline use.
        folder = Path(self._snapshot(listing, listing.requested_revision, wanted, to))
        advance(sum(file.size for file in plan.files if file not in large))
        return folder

    def _is_ours(self, file: File) -> bool:
        """Whether a file is downloaded here: small files are not, and files beyond 50 GB are only available by Xet."""
        return file.sha256 is not None and file.size <= self.largest

    def _target(self, listing: Listing, file: File, to: Path | None) -> Path:
        """Where the library expects a file: at its path in the folder `to`, or under its digest in the cache."""
        from huggingface_hub.file_download import repo_folder_name

        if to is not None:
            return to / file.path
        return self.cache / repo_folder_name(repo_id=listing.repo, repo_type="model") / "blobs" / str(file.sha256)

    def _snapshot(
        self, listing: Listing, revision: str | None, wanted: Sequence[File], to: Path | None, dry_run: bool = False
    ) -> Any:
        """Calls the library's snapshot_download for exactly these files; `dry_run` only lists what is missing."""
        from huggingface_hub import snapshot_download

        names = [glob.escape(file.path) for file in wanted]
        try:
            return snapshot_download(
                listing.repo, revision=revision, allow_patterns=names, local_dir=to, dry_run=dry_run
            )
        except Exception as error:
            raise self.to_ktx_error(error, listing.repo, listing.revision) from error

    def _check_access(self, listing: Listing, file: File) -> None:
        """Raises KtxError if the hub denies access to a file; asks for its metadata only."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        try:
            get_hf_file_metadata(hf_hub_url(listing.repo, file.path, revision=listing.revision))
        except Exception as error:
            raise self.to_ktx_error(error, listing.repo, listing.revision) from error

    def _fetch_file(
        self, listing: Listing, file: File, to: Path | None, advance: Callable[[int], None], stop: threading.Event
    ) -> None:
        """Downloads one large file, resumes a partial one, and verifies its SHA-256.

        The partial file is locked, because two processes would write it at once. A wrong digest after a resume restarts
        from byte 0; after a complete download it is an error.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub._local_folder import write_download_metadata  # or else the library hashes the file again
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        target = self._target(listing, file, to)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = _partial_path(target, file)
        with open(part, "a+b") as raw:
            try:
                fcntl.flock(raw, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise KtxError(f"{part}: another download is writing this file; wait for it, or stop it") from error
            if raw.seek(0, os.SEEK_END) > file.size:
                raw.truncate(0)
            while True:
                growing = ResumableFile(raw, advance, stop)
                resumed_bytes = growing.tell()
                http_get(
                    hf_hub_url(listing.repo, file.path, revision=listing.revision),
                    growing,  # type: ignore[arg-type]
                    resume_size=resumed_bytes,
                    headers=build_hf_headers(),
                    expected_size=file.size,
                    displayed_filename=file.path,
                )
                if growing.digest.hexdigest() == file.sha256:
                    break
                raw.truncate(0)
                if not resumed_bytes:
                    raise BadFile(
                        f"{file.path}: the SHA-256 of the downloaded file differs from the hub's; the same command"
                        " downloads it again"
                    )
                advance(-file.size)  # the data of the earlier download may be wrong: start from the beginning
            os.replace(part, target)
        if to is not None:
            write_download_metadata(to, file.path, listing.revision, str(file.sha256))

    def to_ktx_error(self, error: Exception, repo: str, revision: str | None) -> KtxError:
        """Converts an error of the library to a KtxError with a remedy."""
        from huggingface_hub import errors, get_token

        token = "the account of your token has no access" if get_token() else "set HF_TOKEN to a token of that account"
        known: list[tuple[type[Exception], type[KtxError], str]] = [
            (
                errors.GatedRepoError,
                BadFile,
                f"is gated: accept its terms at {self.endpoint}/{repo} with an account; {token}"
                f" ({self.endpoint}/settings/tokens)",
            ),
            (
                errors.RepositoryNotFoundError,
                BadFile,
                f"{self.endpoint} has no such repository, or it is private: check the name, or set HF_TOKEN to a token"
                " that may read it",
            ),
            (errors.RevisionNotFoundError, BadFile, f"has no revision {revision!r}"),
            (errors.HFValidationError, UsageError, "is not a valid repository name; expected OWNER/NAME"),
            (errors.OfflineModeIsEnabled, UsageError, "HF_HUB_OFFLINE is set, which forbids downloads; unset it"),
        ]
        chain = [error, *filter(None, (error.__cause__, error.__context__))]
        for kind, ktx_error, message in known:
            if any(isinstance(cause, kind) for cause in chain):
                return ktx_error(f"{repo}: {message}")
        response = getattr(error, "response", None)
        if response is not None and response.status_code == 401:
            return UsageError(f"{repo}: {self.endpoint} does not accept the token; check HF_TOKEN, or unset it")
        first_line = next((line for line in str(error).splitlines() if line.strip()), "")
        return KtxError(
            f"{repo}: {self.endpoint}: {type(error).__name__}: {first_line[:200]}; the same command resumes the"
            " download, and HF_ENDPOINT may name a mirror"
        )


class ResumableFile:
    """A file for `http_get` that hashes its content, reports progress, and rejects writes after `stop` is set."""

    def __init__(self, file: Any, advance: Callable[[int], None], stop: threading.Event):
        self.file, self.advance, self.stop = file, advance, stop
        self.digest = self._digest()

    def _digest(self) -> Any:
        self.file.seek(0)
        return hashlib.file_digest(self.file, "sha256")

    def write(self, data: bytes) -> int:
        """Appends downloaded bytes; raises KtxError once the download is stopped, which ends http_get."""
        if self.stop.is_set():
            raise KtxError("the download was stopped")
        self.digest.update(data)
        self.advance(len(data))
        self.file.write(data)
        self.file.flush()
        return len(data)

    def tell(self) -> int:
        return self.file.tell()

    def seek(self, position: int) -> int:
        return self.file.seek(position)

    def truncate(self) -> int:
        """Truncates at the current position; `http_get` calls it when the server restarts from the first byte."""
        position, end = self.file.tell(), self.file.seek(0, os.SEEK_END)
        self.file.truncate(position)
        self.advance(position - end)
        self.digest = self._digest()
        return self.file.seek(position)


def _partial_path(target: Path, file: File) -> Path:
    """The path of the partial file; it includes the digest, so a changed file does not resume an old download."""
    return target.with_name(f"{target.name}.{str(file.sha256)[:8]}.incomplete")


def _fetch_all(files: Sequence[File], fetch: Callable[[File], None], stop: threading.Event) -> None:
    """Downloads files on WORKERS threads; the first error, or Ctrl-C, stops all of them.

    Threads that still wait for a server then are abandoned (daemon threads).
    """
    pending: queue.SimpleQueue[File | None] = queue.SimpleQueue()
    results: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    for file in [*files, *[None] * WORKERS]:
        pending.put(file)

    def work() -> None:
        try:
            while (file := pending.get()) is not None and not stop.is_set():
                fetch(file)
            results.put(None)
        except BaseException as error:  # the calling thread raises it
            results.put(error)

    threads = [threading.Thread(target=work, name="ktx-download", daemon=True) for _ in range(WORKERS)]
    for thread in threads:
        thread.start()
    try:
        for _ in threads:
            if (error := results.get()) is not None:
                raise error
    finally:
        stop.set()
        with suppress(KeyboardInterrupt):
            for thread in threads:
                thread.join(timeout=0.5)
