"""The Hugging Face hub, or a mirror (HF_ENDPOINT), with resumable downloads of large files.

huggingface_hub lists repositories, authenticates, manages the cache and downloads small files. It deletes the partial
file when a download ends early, which costs hours for a file of 40 GB. So large files are downloaded here, into a
partial file that stays and that is then moved to its place in the folder or in the cache.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from ktx.errors import BadFile, KtxError, UsageError
from ktx.hub.file_selection import File
from ktx.hub.listing import DownloadPlan, Listing

WORKERS = 4  # concurrent downloads
CHUNK_BYTES = 1 << 20  # bytes written at once; an interrupted download loses at most this much
MAX_HTTP_BYTES = 50_000_000_000  # the hub sends larger files by Xet only, which the library speaks
MAX_RETRIES = 5  # repeated requests in a row that bring no byte, after 2, 4, ... s
RATE_LIMIT_WAIT_S = 60  # MAX_RETRIES times: the period of the hub's rate limits
PASSING_STATUS = (408, 429, 500, 502, 503, 504)  # answers after which a later request may succeed

FINAL_ERRORS = (KtxError, OSError)  # broken connections are neither; refusals of the hub and a full disk are OSErrors


class HuggingFace:
    """The Hugging Face hub. HF_TOKEN, or the token stored by `hf auth login`, is sent only to the hub."""

    def __init__(self) -> None:
        from huggingface_hub import constants
        from huggingface_hub.utils import disable_progress_bars, logging

        logging.set_verbosity_error()
        disable_progress_bars()
        self.endpoint, self.cache = constants.ENDPOINT, Path(constants.HF_HUB_CACHE)
        self.timeout_s = constants.HF_HUB_DOWNLOAD_TIMEOUT

    def list_repo(self, repo: str, revision: str | None) -> Listing:
        """Lists a repository's files at one commit, with sizes and the digests of large ones.

        Raises KtxError with a remedy.
        """
        from huggingface_hub import HfApi

        with self._convert_errors(repo, revision):
            info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=30)
        files = tuple(
            File(one.rfilename, one.size or 0, one.lfs.sha256 if one.lfs else None) for one in info.siblings or ()
        )
        return Listing(repo, revision, info.sha or revision or "main", files)

    def plan(self, listing: Listing, wanted: Sequence[File], local_dir: Path | None) -> DownloadPlan:
        """Returns which files are still to be downloaded, and how many bytes of them are on disk already.

        Raises KtxError if the hub denies access, before anything is downloaded.
        """
        with TemporaryDirectory() as empty:  # stands for a folder that does not exist, which the library would create
            folder = Path(empty) if local_dir is not None and not local_dir.exists() else local_dir
            found = self._download_snapshot(listing, listing.revision, wanted, folder, dry_run=True)
        missing = {one.filename for one in found if one.will_download}
        files = tuple(file for file in wanted if file.path in missing)
        parts = [_partial_path(target, file) for target, file in self._large_files(listing, files, local_dir).items()]
        return DownloadPlan(files, local_dir or self.cache, sum(part.stat().st_size for part in parts if part.exists()))

    def fetch(
        self,
        listing: Listing,
        wanted: Sequence[File],
        plan: DownloadPlan,
        local_dir: Path | None,
        advance: Callable[[int], None],
    ) -> Path:
        """Downloads the files, to the folder `local_dir` or the library's cache; returns the folder.

        Large files are downloaded here, several at once; the first error, or Ctrl-C, stops all of them. The library
        downloads the others. `advance` is called with the bytes that arrived.
        """
        large, stop = self._large_files(listing, plan.files, local_dir), threading.Event()
        with self._convert_errors(listing.repo, listing.revision), ThreadPoolExecutor(WORKERS) as pool:
            jobs = [pool.submit(self._fetch_file, listing, *item, advance, stop) for item in large.items()]
            try:
                for job in as_completed(jobs):
                    job.result()
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if local_dir is None:  # the library also stores the branch's name, for later offline use
            revision, others = listing.requested_revision, wanted
        else:  # the library would compute the SHA-256 of the large files again
            revision, others = listing.revision, [file for file in wanted if local_dir / file.path not in large]
        return Path(self._download_snapshot(listing, revision, others, local_dir, tqdm_class=_progress_class(advance)))

    def _large_files(self, listing: Listing, files: Sequence[File], local_dir: Path | None) -> dict[Path, File]:
        """Returns the files to download here, by their path: in the folder `local_dir`, or by digest in the cache.

        The hub's documentation describes the folders of the cache, which other programs share.
        """
        blobs = self.cache / "--".join(["models", *listing.repo.split("/")]) / "blobs"
        large = [file for file in files if file.sha256 is not None and file.size <= MAX_HTTP_BYTES]
        return {blobs / str(file.sha256) if local_dir is None else local_dir / file.path: file for file in large}

    def _download_snapshot(
        self, listing: Listing, revision: str | None, wanted: Sequence[File], local_dir: Path | None, **more: Any
    ) -> Any:
        """Calls the library's snapshot_download for exactly these files; `dry_run` only lists what is missing."""
        from huggingface_hub import snapshot_download

        names = [glob.escape(file.path) for file in wanted]
        with self._convert_errors(listing.repo, listing.revision):
            return snapshot_download(listing.repo, revision=revision, allow_patterns=names, local_dir=local_dir, **more)

    def _fetch_file(
        self, listing: Listing, target: Path, file: File, advance: Callable[[int], None], stop: threading.Event
    ) -> None:
        """Downloads one large file, resumes a partial one, and verifies its SHA-256.

        The partial file is locked, because two processes would write it at once. A wrong digest after a resume restarts
        from byte 0; after a complete download it is an error.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        part = _partial_path(target, file)
        with open(part, "a+b") as output:
            try:
                fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise KtxError(f"{part}: another download is writing this file; wait for it, or stop it") from error
            if (resumed_bytes := output.seek(0, os.SEEK_END)) > file.size:
                resumed_bytes = output.truncate(0)
            while self._append_rest(listing, file, output, advance, stop) != file.sha256:
                advance(-output.tell())
                output.truncate(0)
                if not resumed_bytes:
                    raise BadFile(
                        f"{file.path}: the SHA-256 of the downloaded file differs from the hub's; the same command"
                        " downloads it again"
                    )
                resumed_bytes = 0  # the data of the earlier download may be wrong: start from the beginning
            os.replace(part, target)

    def _append_rest(
        self, listing: Listing, file: File, output: BinaryIO, advance: Callable[[int], None], stop: threading.Event
    ) -> str:
        """Appends the bytes that `output` lacks of a file, and returns the SHA-256 of all of it.

        First it digests the bytes of an earlier download. After a broken connection it requests the rest, up to
        MAX_RETRIES times without progress. Raises KtxError once `stop` is set.
        """
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        url = hf_hub_url(listing.repo, file.path, revision=listing.revision)
        digest, num_failures = hashlib.sha256(), 0
        output.seek(0)
        while data := output.read(CHUNK_BYTES):
            _raise_if_stopped(stop)
            digest.update(data)
        while (start := output.tell()) < file.size:
            headers = build_hf_headers() | {"Accept-Encoding": "identity", "Range": f"bytes={start}-"}
            try:
                with get_session().stream("GET", url, headers=headers, timeout=self.timeout_s) as response:
                    hf_raise_for_status(response)
                    if start and response.status_code == 200:  # a server without ranges sends the complete file
                        advance(-start)
                        output.truncate(output.seek(0))
                        digest = hashlib.sha256()
                    for data in response.iter_bytes(CHUNK_BYTES):
                        _raise_if_stopped(stop)
                        output.write(data)
                        digest.update(data)
                        advance(len(data))
                break
            except Exception as error:
                status = getattr(getattr(error, "response", None), "status_code", None)
                num_failures = 0 if output.tell() > start else num_failures + 1
                if num_failures > MAX_RETRIES or (status not in PASSING_STATUS and isinstance(error, FINAL_ERRORS)):
                    raise
                if stop.wait(RATE_LIMIT_WAIT_S if status == 429 else 2**num_failures):
                    raise
        return digest.hexdigest()

    @contextmanager
    def _convert_errors(self, repo: str, revision: str | None) -> Iterator[None]:
        """Converts the library's errors to KtxErrors with a remedy."""
        try:
            yield
        except KtxError:
            raise
        except Exception as error:  # the library's errors have no common base but Exception
            raise self.to_ktx_error(error, repo, revision) from error

    def to_ktx_error(self, error: Exception, repo: str, revision: str | None) -> KtxError:
        """Converts an error of the library to a KtxError with a remedy, which commands print as one line."""
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


def _progress_class(advance: Callable[[int], None]) -> Any:
    """Returns a class for the library's progress bars that shows nothing and calls `advance`.

    The library counts the same bytes in several bars, at the network and at the disk: the largest count is reported.
    Another bar counts files.
    """
    from huggingface_hub.utils import tqdm

    lock, reported_bytes = threading.Lock(), 0

    class Progress(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.counts_bytes, self.nbytes = kwargs.get("unit") == "B", 0

        def update(self, n: float | None = 1) -> None:
            nonlocal reported_bytes
            with lock:
                self.nbytes += int(n or 0) if self.counts_bytes else 0
                new_bytes = max(0, self.nbytes - reported_bytes)
                reported_bytes += new_bytes
            advance(new_bytes)

    return Progress


def _raise_if_stopped(stop: threading.Event) -> None:
    if stop.is_set():
        raise KtxError("the download was stopped")


def _partial_path(target: Path, file: File) -> Path:
    """The path of the partial file; it includes the digest, so a changed file does not resume an old download."""
    return target.with_name(f"{target.name}.{str(file.sha256)[:8]}.incomplete")
