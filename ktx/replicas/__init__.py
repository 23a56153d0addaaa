"""Several replicas behind one address, on Ray Serve."""

from __future__ import annotations

import os
import secrets
import sys


def configure_ray_env(own_cluster: bool) -> None:
    """Sets the environment variables that Ray reads when it is imported; variables that are set already stay.

    Ray sends no usage statistics and logs every line. A cluster of our own requires a random token, because without
    one every process that reaches its ports may run code in it.

    Args:
        own_cluster: whether the server starts its own cluster instead of joining a running one.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # deduplication would merge equal lines of two replicas
    os.environ.setdefault("RAY_COLOR_PREFIX", str(int(sys.stderr.isatty())))
    if own_cluster:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        if "RAY_AUTH_TOKEN_PATH" not in os.environ:
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
