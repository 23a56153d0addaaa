"""Prefix affinity: routes a request to the replica that cached the longest prefix of its prompt, unless that replica
has many more requests than the others. Does not import Ray.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, OrderedDict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ktx.server.model_names import match_model_name

KEY_CHARS = 256  # characters of prompt text per key, about one page of 64 tokens
MAX_KEYS = 512  # keys per prompt; text after them does not affect the choice
UNSENT_TIMEOUT_S = 10.0  # a request that no replica accepted within this time is no longer counted
PROMPT_FIELDS = ("cache_salt", "system", "instructions", "tools", "messages", "input", "prompt")


def prefix_keys(body: bytes, adapters: Collection[str] = ()) -> list[bytes]:
    """Hashes the prefixes of a request's prompt, one key per `KEY_CHARS` characters, by which the router finds the
    replica that has computed the same prompt's beginning.

    Args:
        body: the JSON body of the request.
        adapters: names of LoRA adapters. Requests for an adapter share no pages with the model or another adapter.

    Returns:
        One 16-byte key per prefix, the shortest prefix first; empty for a short prompt or a body that is not JSON.
    """
    try:
        params = json.loads(body)
    except (ValueError, RecursionError):
        return []
    if not isinstance(params, dict):
        return []
    text = "".join(_prompt_texts(params))[: KEY_CHARS * MAX_KEYS]
    keys, digest = [], hashlib.blake2b(_adapter_name(params, adapters).encode(), digest_size=16)
    for start in range(0, len(text) - KEY_CHARS + 1, KEY_CHARS):
        digest.update(text[start : start + KEY_CHARS].encode("utf-8", "surrogatepass"))
        keys.append(digest.digest())
    return keys


def _adapter_name(params: dict[str, Any], adapters: Collection[str]) -> str:
    """Returns the LoRA adapter that a request names as its model; empty when it names the base model."""
    name = params.get("model")
    return match_model_name(name, adapters) if isinstance(name, str) else ""


def _prompt_texts(params: dict[str, Any]) -> Iterable[str]:
    """Yields the prompt message by message, so that a conversation starts with the text of its earlier turns."""
    for name in PROMPT_FIELDS:
        if name in params:
            value = params[name]
            yield f"\n{name}:"
            for part in value if isinstance(value, list) else [value]:
                yield part if isinstance(part, str) else json.dumps(part)
                yield "\n"


@dataclass(frozen=True)
class RoutedRequest:
    """A request that was routed to a replica. `sent` is whether the replica accepted it."""

    replica: Hashable
    since: float
    sent: bool


class Affinity:
    """Tracks which prefix keys each replica has seen and how many requests it runs.

    Args:
        pages: number of keys that a replica's cache holds.
        max_imbalance: how many more requests than the least loaded replica a replica may have and still be preferred
            for the prefixes that it cached.
    """

    def __init__(self, pages: int, max_imbalance: int):
        self.pages, self.max_imbalance = pages, max_imbalance
        self.cached_keys: dict[Hashable, OrderedDict[bytes, None]] = {}
        self.requests: dict[str, RoutedRequest] = {}

    def rank(self, keys: Sequence[bytes], replicas: Sequence[Hashable]) -> list[Hashable]:
        """Sorts the replicas for a prompt with these keys, the best one first.

        Replicas are ranked by cached prefix, then by number of requests, then by number of cached keys.
        """
        self._remove_stale(replicas)
        num_requests = Counter(request.replica for request in self.requests.values())
        min_requests = min((num_requests[replica] for replica in replicas), default=0)

        def sort_key(replica: Hashable) -> tuple[int, int, int]:
            """Returns the rank of a replica, lowest first; an overloaded one gets no credit for cached prefixes."""
            num_cached = (
                self.num_cached(keys, replica) if num_requests[replica] - min_requests < self.max_imbalance else 0
            )
            return -num_cached, num_requests[replica], len(self.cached_keys.get(replica, ()))

        return sorted(replicas, key=sort_key)

    def num_cached(self, keys: Sequence[bytes], replica: Hashable) -> int:
        """Returns how many of the keys, counted from the first, are in the replica's cache."""
        cached: Mapping[bytes, None] = self.cached_keys.get(replica, {})
        return next((i for i, key in enumerate(keys) if key not in cached), len(keys))

    def on_routed(self, request: str, replica: Hashable, keys: Sequence[bytes], sent: bool = True) -> None:
        """Records that a request was routed to a replica.

        The router calls it when it chooses the replica (`sent=False`), because other requests are routed before the
        replica accepts this one, and again when a replica accepts it, which may be another one.

        Args:
            request: Ray's id of the request.
            replica: the replica.
            keys: the prompt's prefix keys, which the replica's cache will hold.
            sent: whether the replica accepted the request.
        """
        self.requests[request] = RoutedRequest(replica, time.monotonic(), sent)
        cached = self.cached_keys.setdefault(replica, OrderedDict())
        # The shortest prefix becomes the most recently used key, because longer ones are useless once it is evicted.
        for key in reversed(keys):
            cached[key] = None
            cached.move_to_end(key)
        while len(cached) > self.pages:
            cached.popitem(last=False)

    def on_finish(self, request: str) -> None:
        """Removes a finished request."""
        self.requests.pop(request, None)

    def _remove_stale(self, replicas: Sequence[Hashable]) -> None:
        """Removes replicas that no longer exist, and requests whose clients left before a replica accepted them.

        Ray Serve reports neither.
        """
        now = time.monotonic()
        for stale in self.cached_keys.keys() - set(replicas):
            self.cached_keys.pop(stale)
        for name, request in list(self.requests.items()):
            if request.replica not in replicas or (not request.sent and now - request.since > UNSENT_TIMEOUT_S):
                self.requests.pop(name)
