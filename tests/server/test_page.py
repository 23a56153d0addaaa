"""The page's files over HTTP: what they weigh, what comes with them, who gets them, and that they lead nowhere else."""

from __future__ import annotations

import http.client
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest

from ktx.server.auth import AccessPolicy
from ktx.server.static import FILES, PAGE_DIR, TYPES
from tests.server.conftest import serving

ROOT = Path(__file__).resolve().parents[2]
LARGEST = 100_000  # bytes of the whole page
HTML_FROM_TEXT = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "DOMParser")


class Tags(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inline = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("script", "style"):
            self.inline += data.strip()


def raw(base, path, method="GET", **headers):
    """The status of a path that no client has tidied up."""
    connection = http.client.HTTPConnection(base.removeprefix("http://"), timeout=10)
    connection.putrequest(method, path, skip_host="host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


@pytest.fixture(scope="module")
def keyed():
    """A server with a key that has no model yet."""
    with serving(access=AccessPolicy(("key",))) as (base, _):
        yield base


def test_the_whole_page_is_small():
    assert sum(path.stat().st_size for path in PAGE_DIR.iterdir()) < LARGEST


def test_every_file_is_served_and_no_other_exists():
    assert {path.name for path in PAGE_DIR.iterdir()} == set(FILES.values())
    assert {Path(name).suffix for name in FILES.values()} == set(TYPES)


@pytest.mark.parametrize("path", FILES)
def test_files_come_without_a_key_and_before_there_is_a_model(keyed, path):
    answer = httpx.get(keyed + path)
    data = (PAGE_DIR / FILES[path]).read_bytes()
    assert answer.status_code == 200 and answer.content == data
    assert answer.headers["content-type"] == TYPES[Path(FILES[path]).suffix]
    head = httpx.head(keyed + path)
    assert head.status_code == 200 and not head.content and head.headers["content-length"] == str(len(data))
    again = httpx.get(keyed + path, headers={"if-none-match": answer.headers["etag"]})
    assert again.status_code == 304 and not again.content


@pytest.mark.parametrize("path", FILES)
def test_the_policy_allows_this_server_alone(keyed, path):
    headers = httpx.get(keyed + path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert {value for name, value in policy.items() if name.endswith("-src")} == {"'none'", "'self'"}
    assert "unsafe" not in headers["content-security-policy"]
    assert policy["require-trusted-types-for"] == "'script'" and policy["trusted-types"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"


def test_nothing_is_written_into_the_page_itself():
    page = Tags((PAGE_DIR / "index.html").read_text())
    assert not page.inline
    for tag, attributes in page.tags:
        assert tag != "style" and (tag != "script" or attributes.get("src")), tag
        assert not [name for name in attributes if name.startswith("on") or name == "style"], attributes


@pytest.mark.parametrize("name", sorted(set(FILES.values())))
def test_no_file_leads_to_another_server_or_makes_markup_of_text(name):
    text = (PAGE_DIR / name).read_text()
    assert set(re.findall(r"https?://\w[^\s\"'`]*|[\"'(]//\w[^\s\"'`]*", text)) <= {"http://www.w3.org/2000/svg"}
    assert not [word for word in HTML_FROM_TEXT if word in text]


def test_what_files_name_is_there():
    named = {
        value
        for _, one in Tags((PAGE_DIR / "index.html").read_text()).tags
        for key, value in one.items()
        if key in ("src", "href")
    }
    assert {f"/{path}" for path in named if path and not path.startswith("#")} <= set(FILES)
    for path in PAGE_DIR.glob("*.js"):
        imported = re.findall(r"from \"\./([\w.-]+)\"", path.read_text())
        assert {f"/page/{name}" for name in imported} <= set(FILES), path.name


OTHERS = [
    "/page",
    "/page/",
    "/page/index.html",
    "/page/none.js",
    "/page/style.css/",
    "/page/style.css/x",
    "/page//style.css",
    "//",
    "//page/style.css",
    "/PAGE/style.css",
    "/page/../page.py",
    "/page/../static.py",
    "/page/../../../etc/passwd",
    "/page/%2e%2e/static.py",
    "/page/..%2fstatic.py",
    "/page/..%5cstatic.py",
    "/page/style.css%00",
    "/page/style.css%00.js",
    "/./page/../v1/models",
    "/page/;/v1/models",
]


@pytest.mark.parametrize("path", OTHERS)
def test_nothing_beside_the_files_is_open(keyed, path):
    assert raw(keyed, path) == 401


@pytest.mark.parametrize("path", OTHERS)
def test_nothing_beside_the_files_is_there(server, path):
    assert raw(server, path) in (404, 307)  # 307: to the same path without a slash


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "TRACE"])
def test_the_files_are_there_to_be_read_alone(keyed, server, method):
    for path in ("/", "/page/style.css"):
        assert raw(keyed, path, method) == 401
        assert raw(server, path, method) == 405


def test_hosts_and_origins_are_checked_for_the_page_too(server, keyed):
    assert raw(server, "/", host="evil.example") == 403
    assert raw(server, "/", host="localhost") == 200
    assert raw(keyed, "/", host="chat.example", origin="http://evil.example") == 403


def test_a_query_changes_nothing(keyed):
    assert raw(keyed, "/?model=x") == 200 and raw(keyed, "/v1/models?/") == 401


def test_the_wheel_holds_the_page():
    code = (
        "import distutils.core, setuptools\n"
        "build = distutils.core.run_setup('setup.py', stop_after='commandline').get_command_obj('build_py')\n"
        "build.finalize_options()\n"
        "print(*[name for package, _, _, names in build.data_files if package == 'ktx.server' for name in names])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {Path(name).name for name in done.stdout.split()} >= set(FILES.values())
