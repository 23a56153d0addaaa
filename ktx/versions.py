"""What ktx is called where packages are, and how its extras are installed. No imports: `ktx doctor` reads it where torch is broken."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from urllib.parse import unquote, urlsplit

DISTRIBUTION = "ktx-moe"  # `ktx` on the package index is somebody else's: no message of ours may send anybody there
CHECKOUT = Path(__file__).resolve().parent.parent


def install(extra: str) -> str:
    """The command that adds an extra (`serve`, `ray`, ...) to this installation: a checkout, or a wheel."""
    if (CHECKOUT / "pyproject.toml").is_file():
        command = f"pip install -e '.[{extra}]'"
        return command if Path.cwd() == CHECKOUT else f"{command} in {CHECKOUT}"
    return f"pip install '{_wheel()}[{extra}]'"


def _wheel() -> str:
    """The wheel that this was installed from, or the name that `make wheel` gives it."""
    import ktx

    try:
        url = json.loads(importlib.metadata.distribution(DISTRIBUTION).read_text("direct_url.json") or "{}").get(
            "url", ""
        )
    except importlib.metadata.PackageNotFoundError:
        url = ""
    if url.endswith(".whl"):
        return unquote(urlsplit(url).path) if url.startswith("file:") else url
    return f"dist/{DISTRIBUTION.replace('-', '_')}-{ktx.__version__}-cp311-abi3-linux_x86_64.whl"
