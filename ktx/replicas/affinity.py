"""Which replica a prompt goes to: the one that has computed most of its beginning, unless that one is much busier than others. No Ray here."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, OrderedDict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ktx.server.model_names import meant

PIECE = 256  # characters that one key stands for, about a page of 64 tokens
MOST = 512  # keys of a prompt; what lies behind them cannot change the choice
UNSENT = 10.0  # seconds after which a request that reached no replica is not counted any more
FIELDS = ("cache_salt", "system", "instructions", "tools", "messages", "input", "prompt")  # where prompts stand


def keys_of(body: bytes, adapters: Collection[str] = ()) -> list[bytes]:
    """A key for every beginning of the request's prompt, the shorter first; none for a short prompt or no JSON.

    `adapters`: names of LoRA adapters that a request's model may be; they share no pages with the model or each other.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return []
    if not isinstance(asked, dict):
        return []
    text = "".join(_texts(asked))[: PIECE * MOST]
    keys, digest = [], hashlib.blake2b(_adapter(asked, adapters).encode(), digest_size=16)
    for start in range(0, len(text) - PIECE + 1, PIECE):
        digest.update(text[start : start + PIECE].encode("utf-8", "surrogatepass"))
        keys.append(digest.digest())
    return keys


def _adapter(asked: dict[str, Any], adapters: Collection[str]) -> str:
    """The adapter that a request is answered by; empty where that is the model alone, by whatever name."""
    name = asked.get("model")
    return meant(name, adapters) if isinstance(name, str) else ""


def _texts(asked: dict[str, Any]) -> Iterable[str]:
    """Message by message, so that a conversation begins as its earlier turns did."""
    for name in FIELDS:
        if name in asked:
            value = asked[name]
            yield f"\n{name}:"
            for part in value if isinstance(value, list) else [value]:
                yield part if isinstance(part, str) else json.dumps(part)
                yield "\n"


@dataclass(frozen=True)
class Asked:
    """A request on its way to a replica, or there."""

    replica: Hashable
    since: float
    sent: bool


class Affinity:
    """What each replica has been asked lately and how many requests it has. `pages`: keys that a replica's cache holds; `crowd`: how many
    more requests than the idlest one a replica may have and still get those whose beginning it knows.
    """

    def __init__(self, pages: int, crowd: int):
        self.pages, self.max_imbalance = pages, crowd
        self.kept: dict[Hashable, OrderedDict[bytes, None]] = {}
        self.asked: dict[str, Asked] = {}

    def order(self, keys: Sequence[bytes], replicas: Sequence[Hashable]) -> list[Hashable]:
        """The replicas, the best one first."""
        self._forget(replicas)
        busy = Counter(asked.replica for asked in self.asked.values())
        idlest = min((busy[one] for one in replicas), default=0)

        def rank(one: Hashable) -> tuple[int, int, int]:
            known = self.known(keys, one) if busy[one] - idlest < self.max_imbalance else 0
            return -known, busy[one], len(self.kept.get(one, ()))

        return sorted(replicas, key=rank)

    def known(self, keys: Sequence[bytes], replica: Hashable) -> int:
        """How many of the keys, from the first on, the replica has been asked before."""
        kept: Mapping[bytes, None] = self.kept.get(replica, {})
        return next((at for at, key in enumerate(keys) if key not in kept), len(keys))

    def on_start(self, request: str, replica: Hashable, keys: Sequence[bytes], sent: bool = True) -> None:
        """A request goes to a replica; told again when it is there (`sent`), or goes to another one after all."""
        self.asked[request] = Asked(replica, time.monotonic(), sent)
        kept = self.kept.setdefault(replica, OrderedDict())
        for key in reversed(keys):  # the shortest beginning is the youngest: what lies behind a lost one is of no use
            kept[key] = None
            kept.move_to_end(key)
        while len(kept) > self.pages:
            kept.popitem(last=False)

    def on_finish(self, request: str) -> None:
        self.asked.pop(request, None)

    def _forget(self, replicas: Sequence[Hashable]) -> None:
        """Replicas that have gone, and requests whose clients left before they were sent: nobody tells of those."""
        now = time.monotonic()
        for gone in self.kept.keys() - set(replicas):
            self.kept.pop(gone)
        for request, asked in list(self.asked.items()):
            if asked.replica not in replicas or not asked.sent and now - asked.since > UNSENT:
                self.asked.pop(request)
