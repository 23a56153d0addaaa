"""The Hugging Face hub, or a mirror (HF_ENDPOINT). huggingface_hub lists, signs in and keeps the files; a large file that was cut goes on where it was.

That library begins a broken file anew since its second version, which costs hours of a file of 40 GB. So the large ones are
fetched here, with its own `http_get`, into a file that stays, and are put where the library then finds them.
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
from ktx.hub.listing import Listing, Plan

WORKERS = 4  # files at once
PIECE = 1 << 20  # bytes that are written at once: what a cut loses of a file
SMALL = 10_000_000  # bytes of what the library may fetch without a word


class HuggingFace:
    """HF_TOKEN, or what `hf auth login` has stored, is sent to the hub and to nobody else."""

    def __init__(self) -> None:
        from huggingface_hub import constants
        from huggingface_hub.utils import disable_progress_bars, logging

        logging.set_verbosity_error()
        disable_progress_bars()
        constants.DOWNLOAD_CHUNK_SIZE = PIECE
        self.endpoint, self.largest = constants.ENDPOINT, constants.MAX_HTTP_DOWNLOAD_SIZE
        self.cache = Path(constants.HF_HUB_CACHE)

    def look(self, repo: str, revision: str | None) -> Listing:
        from huggingface_hub import HfApi

        try:
            info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=30)
        except Exception as error:  # the hub client's errors have no common base but Exception
            raise self.told(error, repo, revision) from error
        files = tuple(
            File(one.rfilename, one.size or 0, one.lfs.sha256 if one.lfs else None) for one in info.siblings or ()
        )
        return Listing(repo, revision, info.sha or revision or "main", files)

    def plan(self, listing: Listing, wanted: Sequence[File], to: Path | None) -> Plan:
        place = to or self.cache
        if to is not None and not to.exists():  # the library would make the folder to look into it
            self._may_read(listing, wanted[-1])
            missing = {file.path for file in wanted}
        else:
            missing = {
                one.filename
                for one in self._snapshot(listing, listing.revision, wanted, to, dry_run=True)
                if one.will_download
            }
        files = tuple(file for file in wanted if file.path in missing)
        parts = (_part(self._target(listing, file, to), file) for file in files if self._by_us(file))
        return Plan(files, place, sum(part.stat().st_size for part in parts if part.exists()))

    def fetch(
        self, listing: Listing, wanted: Sequence[File], plan: Plan, to: Path | None, advance: Callable[[int], None]
    ) -> Path:
        from huggingface_hub.utils import enable_progress_bars

        large = list({self._target(listing, file, to): file for file in plan.files if self._by_us(file)}.values())
        if any(file.size > SMALL and file not in large for file in plan.files):
            enable_progress_bars()
        stop = threading.Event()
        try:
            _all(large, lambda file: self._fetch(listing, file, to, advance, stop), stop)
        except KtxError:
            raise
        except Exception as error:
            raise self.told(error, listing.repo, listing.revision) from error
        # By the branch's name, which the library then remembers for those who ask without a network.
        folder = Path(self._snapshot(listing, listing.asked, wanted, to))
        advance(sum(file.size for file in plan.files if file not in large))
        return folder

    def _by_us(self, file: File) -> bool:
        """Small files are not worth it, and those beyond 50 GB come by Xet alone."""
        return file.sha256 is not None and file.size <= self.largest

    def _target(self, listing: Listing, file: File, to: Path | None) -> Path:
        """Where the library looks for a file: under its name in a folder, under its digest in the cache."""
        from huggingface_hub.file_download import repo_folder_name

        if to is not None:
            return to / file.path
        return self.cache / repo_folder_name(repo_id=listing.repo, repo_type="model") / "blobs" / str(file.sha256)

    def _snapshot(
        self, listing: Listing, revision: str | None, wanted: Sequence[File], to: Path | None, dry_run: bool = False
    ) -> Any:
        from huggingface_hub import snapshot_download

        names = [glob.escape(file.path) for file in wanted]
        try:
            return snapshot_download(
                listing.repo, revision=revision, allow_patterns=names, local_dir=to, dry_run=dry_run
            )
        except Exception as error:
            raise self.told(error, listing.repo, listing.revision) from error

    def _may_read(self, listing: Listing, file: File) -> None:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        try:
            get_hf_file_metadata(hf_hub_url(listing.repo, file.path, revision=listing.revision))
        except Exception as error:
            raise self.told(error, listing.repo, listing.revision) from error

    def _fetch(
        self, listing: Listing, file: File, to: Path | None, advance: Callable[[int], None], stop: threading.Event
    ) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub._local_folder import write_download_metadata  # else the library reads all of it again
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        target = self._target(listing, file, to)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = _part(target, file)
        with open(part, "a+b") as raw:
            try:
                fcntl.flock(raw, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise KtxError(f"{part}: another download writes it; wait for it, or end it") from error
            if raw.seek(0, os.SEEK_END) > file.size:
                raw.truncate(0)
            while True:
                growing = Growing(raw, advance, stop)
                continued = growing.tell()
                http_get(
                    hf_hub_url(listing.repo, file.path, revision=listing.revision),
                    growing,  # type: ignore[arg-type]
                    resume_size=continued,
                    headers=build_hf_headers(),
                    expected_size=file.size,
                    displayed_filename=file.path,
                )
                if growing.digest.hexdigest() == file.sha256:
                    break
                raw.truncate(0)
                if not continued:
                    raise BadFile(
                        f"{file.path}: what came is not what the hub promises (SHA-256); begin it anew with the same command"
                    )
                advance(-file.size)  # what an earlier download left may be what is wrong
            os.replace(part, target)
        if to is not None:
            write_download_metadata(to, file.path, listing.revision, str(file.sha256))

    def told(self, error: Exception, repo: str, revision: str | None) -> KtxError:
        """What a user can do about an error of the library."""
        from huggingface_hub import errors, get_token

        token = "the account of your token has not been let in" if get_token() else "set HF_TOKEN to a token of it"
        known: list[tuple[type[Exception], type[KtxError], str]] = [
            (
                errors.GatedRepoError,
                BadFile,
                f"is gated: accept its terms at {self.endpoint}/{repo} with an account; {token} ({self.endpoint}/settings/tokens)",
            ),
            (
                errors.RepositoryNotFoundError,
                BadFile,
                f"{self.endpoint} has no such repository, or shows it only to some: check the name, or set HF_TOKEN to a token that may read it",
            ),
            (errors.RevisionNotFoundError, BadFile, f"has no revision {revision!r}"),
            (errors.HFValidationError, UsageError, "is no repository's name; write OWNER/NAME"),
            (errors.OfflineModeIsEnabled, UsageError, "HF_HUB_OFFLINE is set, which forbids downloads; unset it"),
        ]
        chain = [error, *filter(None, (error.__cause__, error.__context__))]
        for kind, made, message in known:
            if any(isinstance(one, kind) for one in chain):
                return made(f"{repo}: {message}")
        response = getattr(error, "response", None)
        if response is not None and response.status_code == 401:
            return UsageError(f"{repo}: {self.endpoint} does not accept the token; check HF_TOKEN, or unset it")
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        return KtxError(
            f"{repo}: {self.endpoint}: {type(error).__name__}: {first[:200]}; the same command goes on where this one stopped, and HF_ENDPOINT may name a mirror"
        )


class Growing:
    """A file that `http_get` writes: everything in it is hashed and told, and nothing more is taken after `stop`."""

    def __init__(self, file: Any, advance: Callable[[int], None], stop: threading.Event):
        self.file, self.advance, self.stop = file, advance, stop
        self.digest = self._digest()

    def _digest(self) -> Any:
        self.file.seek(0)
        return hashlib.file_digest(self.file, "sha256")

    def write(self, data: bytes) -> int:
        if self.stop.is_set():
            raise KtxError("the download was stopped")
        self.digest.update(data)
        self.advance(len(data))
        self.file.write(data)
        self.file.flush()
        return len(data)

    def tell(self) -> int:
        return self.file.tell()

    def seek(self, place: int) -> int:
        return self.file.seek(place)

    def truncate(self) -> int:
        """Of a server that begins at the first byte again."""
        place, end = self.file.tell(), self.file.seek(0, os.SEEK_END)
        self.file.truncate(place)
        self.advance(place - end)
        self.digest = self._digest()
        return self.file.seek(place)


def _part(target: Path, file: File) -> Path:
    """The beginning of a file; its name tells which contents, so that a changed repository does not continue the old one."""
    return target.with_name(f"{target.name}.{str(file.sha256)[:8]}.incomplete")


def _all(files: Sequence[File], fetch: Callable[[File], None], stop: threading.Event) -> None:
    """Fetches on a few threads; the first error, or Ctrl-C, stops the others. Threads that a silent server holds are left behind."""
    waiting: queue.SimpleQueue[File | None] = queue.SimpleQueue()
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    for file in [*files, *[None] * WORKERS]:
        waiting.put(file)

    def work() -> None:
        try:
            while (file := waiting.get()) is not None and not stop.is_set():
                fetch(file)
            ended.put(None)
        except BaseException as error:  # whoever waits for this thread must hear of it
            ended.put(error)

    threads = [threading.Thread(target=work, name="ktx-download", daemon=True) for _ in range(WORKERS)]
    for thread in threads:
        thread.start()
    try:
        for _ in threads:
            if (error := ended.get()) is not None:
                raise error
    finally:
        stop.set()
        with suppress(KeyboardInterrupt):
            for thread in threads:
                thread.join(timeout=0.5)
