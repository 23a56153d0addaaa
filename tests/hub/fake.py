"""A hub on this machine answers what huggingface_hub and modelscope-hub ask for.

Large files are behind a redirect to another host.
`python -m tests.hub.fake COMMAND` runs a command with a hub that has the demo model under every name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from ktx import demo

COMMIT = "c0ffee" + "0" * 34
LARGE = 1000  # bytes from which a file lies elsewhere, as large ones do
CHUNK = 64 << 10


@dataclass
class Repo:
    files: dict[str, bytes]
    gated: bool = False
    private: bool = False
    claimed: dict[str, int] = field(default_factory=dict)  # sizes of files that are not there


@dataclass
class FakeHub:
    """`cut`: bytes after which a connection to a large file ends, as often as `cuts`. `pace`: seconds for 64 KB."""

    base: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    token: str = "hf_right"
    cut: int = 0
    cuts: int = 0
    pace: float = 0.0
    spoil: bool = False
    ignore_ranges: bool = False
    refusals: int = 0  # requests for a large file that are answered with 503
    seen: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)  # method, path, headers

    def ranges(self, name: str) -> list[int]:
        """First bytes of the requests for a large file."""
        asked = [headers.get("range", "bytes=0-") for _, path, headers in self.seen if path == f"/far/{name}"]
        return [int(re.findall(r"\d+", one)[0]) for one in asked]


def asked_in_process(there: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has huggingface_hub in this process ask the hub `there`, with its cache and its token in `folder`."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", there.base)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", there.base + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))


@contextlib.contextmanager
def hub() -> Iterator[FakeHub]:
    made = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": made}))
    server.daemon_threads = True
    made.base = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *args: object) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.seen.append((self.command, path, headers))
        for pattern, answer in (
            (r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", self.info),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self.tree),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
            (r"/far/([^/]+/[^/]+)/(.+)", self.far),
            (r"/api/v1/models/([^/]+/[^/]+)/repo/files", self.modelscope_files),
            (r"/api/v1/models/([^/]+/[^/]+)/repo", self.modelscope_file),
        ):
            if match := re.fullmatch(pattern, path):
                name, *rest = match.groups()
                if (repo := self.allowed(name)) is not None:
                    answer(name, repo, *rest, **({"query": parse_qs(url.query)} if "modelscope" in str(answer) else {}))
                return
        self.say(404, {"error": "not here"})

    def allowed(self, name: str) -> Repo | None:
        repo, given = self.hub.repos.get(name), self.headers.get("authorization", "")
        if given and given != f"Bearer {self.hub.token}" and not self.path.startswith("/far"):
            self.say(401, {"error": "bad token"}, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repo is None or (repo.private and not given and not self.path.startswith("/far")):
            hides = not given and not self.path.startswith("/api/v1")  # Hugging Face tells strangers nothing
            self.say(401 if hides else 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        else:
            return repo
        return None

    def say(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Type": "application/json", "Content-Length": len(body), **(headers or {})}.items():
            self.send_header(key, str(text))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # ---- Hugging Face

    def entries(self, repo: Repo) -> Iterator[tuple[str, int, str, str | None]]:
        for path, data in repo.files.items():
            sha = hashlib.sha256(data).hexdigest()
            yield path, len(data), hashlib.sha1(data).hexdigest(), sha if len(data) >= LARGE else None
        for path, size in repo.claimed.items():
            yield path, size, "0" * 40, hashlib.sha256(path.encode()).hexdigest()

    def info(self, name: str, repo: Repo, revision: str | None) -> None:
        if revision not in (None, "main", COMMIT):
            return self.say(404, {"error": "Invalid rev"}, {"X-Error-Code": "RevisionNotFound"})
        siblings = [
            {"rfilename": path, "size": size, "blobId": blob}
            | ({"lfs": {"sha256": sha, "size": size, "pointerSize": 130}} if sha else {})
            for path, size, blob, sha in self.entries(repo)
        ]
        self.say(200, {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings})

    def tree(self, name: str, repo: Repo, revision: str) -> None:
        found = [
            {"type": "file", "path": path, "size": size, "oid": blob}
            | ({"lfs": {"oid": sha, "size": size, "pointerSize": 130}} if sha else {})
            for path, size, blob, sha in self.entries(repo)
        ]
        self.say(200, found)

    def resolve(self, name: str, repo: Repo, revision: str, path: str) -> None:
        if revision not in ("main", COMMIT):
            return self.say(404, {"error": "Invalid rev"}, {"X-Error-Code": "RevisionNotFound"})
        if repo.gated and not self.headers.get("authorization"):
            return self.say(401, {"error": "gated"}, {"X-Error-Code": "GatedRepo", "X-Repo-Commit": COMMIT})
        if repo.gated and repo.private:
            return self.say(403, {"error": "not you"}, {"X-Error-Code": "GatedRepo", "X-Repo-Commit": COMMIT})
        entry = next((one for one in self.entries(repo) if one[0] == path), None)
        if entry is None:
            return self.say(404, {"error": "no entry"}, {"X-Error-Code": "EntryNotFound"})
        _, size, blob, sha = entry
        if sha is None:
            return self.send(repo.files[path], {"ETag": f'"{blob}"', "X-Repo-Commit": COMMIT})
        far = f"{self.hub.base.replace('127.0.0.1', 'localhost')}/far/{name}/{path}"
        linked = {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(size), "X-Repo-Commit": COMMIT}
        self.say(302, {}, {"Location": far, "ETag": f'"{sha}"', **linked})

    def far(self, name: str, repo: Repo, path: str) -> None:
        if self.command == "GET" and self.hub.refusals:
            self.hub.refusals -= 1
            return self.say(503, {"error": "overloaded"})
        self.send(repo.files[path], {})

    def send(self, data: bytes, headers: dict[str, str]) -> None:
        """All of it or a range, no further than the hub lets it."""
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        if span and self.hub.ignore_ranges:
            span = None
        first = int(span[1]) if span else 0
        last = int(span[2]) if span and span[2] else len(data) - 1
        self.send_response(206 if span else 200)
        if span:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        for key, text in {"Content-Length": str(last + 1 - first), "Accept-Ranges": "bytes", **headers}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command == "HEAD":
            return
        part, hub = data[first : last + 1], self.hub
        if hub.spoil and len(data) >= LARGE:
            part = bytes(len(part))
        for start in range(0, len(part), CHUNK):
            if hub.cuts and hub.cut and start + CHUNK > hub.cut and len(data) >= LARGE:
                hub.cuts -= 1
                self.close_connection = True
                self.connection.shutdown(2)
                return
            try:
                self.wfile.write(part[start : start + CHUNK])
            except OSError:  # the client has left
                self.close_connection = True
                return
            time.sleep(hub.pace)

    # ---- ModelScope

    def modelscope_files(self, name: str, repo: Repo, query: dict[str, list[str]]) -> None:
        files = [
            {
                "Path": path,
                "Name": path.rpartition("/")[2],
                "Size": size,
                "Type": "blob",
                "Sha256": hashlib.sha256(data).hexdigest(),
            }
            for path, data in repo.files.items()
            for size in [len(data)]
        ]
        self.say(200, {"Code": 200, "Success": True, "Data": {"Files": files, "TotalCount": len(files)}})

    def modelscope_file(self, name: str, repo: Repo, query: dict[str, list[str]]) -> None:
        self.send(repo.files[query["FilePath"][0]], {})


class EveryName(dict[str, Repo]):
    """The demo model under any name, as GGUF where the name says so."""

    def get(self, name: str, default: object = None) -> Repo:  # type: ignore[override]
        kind = ".gguf" if name.endswith("GGUF") else ".safetensors"
        paths = [path for path in demo.path().iterdir() if path.suffix in (".json", ".jinja", kind)]
        return Repo({path.name: path.read_bytes() for path in paths})


def main(words: list[str]) -> int:
    with hub() as made, tempfile.TemporaryDirectory() as home:
        made.repos = EveryName()
        keep = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return subprocess.run(words, env=keep | {"HF_ENDPOINT": made.base, "HF_HOME": home}).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
