"""Several replicas behind one address, on Ray Serve."""

from __future__ import annotations

import os
import secrets
import sys


def prepare(own: bool) -> None:
    """Settings that Ray reads when it is imported: a secret without which nobody may talk to a cluster of our own, no reports home, every line of the log."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # it would take the lines of two replicas for one
    os.environ.setdefault("RAY_COLOR_PREFIX", str(int(sys.stderr.isatty())))
    if own:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        if "RAY_AUTH_TOKEN_PATH" not in os.environ:
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
