"""Answers of /v1/responses that later requests go on from or look at: the newest ones, in memory, each for the key that asked for it."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

MAX_STORE_BYTES = 64 << 20  # of all that is kept
NAME = 256  # of them for an id, which lies in several tables
Item = dict[str, Any]


@dataclass(eq=False)
class StoredTurn:
    """A turn of a conversation, JSON lists of items: what came and what was answered, behind the turn before it.

    `users`: the kept answer that it belongs to, and the turns behind it. It stays as long as it has any.
    """

    input_items: bytes
    output: bytes
    ids: int
    previous: StoredTurn | None
    users: int = 0

    @property
    def nbytes(self) -> int:
        return len(self.input_items) + len(self.output) + NAME * self.ids

    def chain(self) -> Iterator[StoredTurn]:
        """This turn and those before it, the newest first."""
        link: StoredTurn | None = self
        while link is not None:
            yield link
            link = link.previous

    def own(self) -> list[Item]:
        return [*json.loads(self.input_items), *json.loads(self.output)]

    def items(self) -> list[Item]:
        """The conversation up to the end of this turn."""
        return [item for link in reversed(list(self.chain())) for item in link.own()]


@dataclass(eq=False)
class StoredResponse:
    """A kept answer: its object without the items, which are the link's output."""

    owner: bytes
    rest: bytes
    link: StoredTurn
    ids: tuple[str, ...]

    def to_dict(self) -> Item:
        return json.loads(self.rest) | {"output": json.loads(self.link.output)}

    def before(self) -> list[Item]:
        """What was answered: the turns before it, and what came with the request."""
        earlier = self.link.previous.items() if self.link.previous else []
        return [*earlier, *json.loads(self.link.input_items)]


class ResponseStore:
    """At most so many answers and bytes; the oldest go first. `owner` is whose key asked: nobody else finds what it has. For one thread."""

    def __init__(self, most: int, nbytes: int = MAX_STORE_BYTES):
        self.max_responses, self.max_bytes, self.nbytes = most, nbytes, 0
        self.answers: OrderedDict[str, StoredResponse] = OrderedDict()
        self.places: dict[tuple[bytes, str], StoredResponse] = {}  # of items by their id: the newest that has it

    def put(self, owner: bytes, answer: Item, asked: list[Item], previous: StoredTurn | None) -> None:
        """`asked`: the items that came with the request. Every item has an id."""
        output = answer["output"]
        ids = tuple(dict.fromkeys(item["id"] for item in (*asked, *output)))
        link = StoredTurn(_bytes(asked), _bytes(output), len(ids), previous)
        kept = StoredResponse(owner, _bytes(answer | {"output": []}), link, ids)
        self._hold(link)
        self.answers[answer["id"]] = kept
        self.nbytes += len(kept.rest)
        self.places |= dict.fromkeys(((owner, name) for name in ids), kept)
        while len(self.answers) > self.max_responses or self.nbytes > self.max_bytes:
            self._drop(next(iter(self.answers)))

    def find(self, owner: bytes, name: str) -> StoredResponse | None:
        found = self.answers.get(name)
        return found if found is not None and found.owner == owner else None

    def delete(self, owner: bytes, name: str) -> bool:
        """Whether there was such an answer. Turns behind it keep what they go on from."""
        if self.find(owner, name) is None:
            return False
        self._drop(name)
        return True

    def items(self, owner: bytes, names: Iterable[str]) -> dict[str, Item]:
        """Those of the named items that are kept."""
        wanted = {name: self.places[owner, name] for name in names if (owner, name) in self.places}
        found: dict[str, Item] = {}
        for answer in dict.fromkeys(wanted.values()):
            found |= {item["id"]: item for item in answer.link.own() if wanted.get(item["id"]) is answer}
        return found

    def _drop(self, name: str) -> None:
        gone = self.answers.pop(name)
        self.nbytes -= len(gone.rest)
        for item in gone.ids:
            if self.places.get((gone.owner, item)) is gone:
                del self.places[gone.owner, item]
        self._release(gone.link)

    def _hold(self, link: StoredTurn | None) -> None:
        """One user more. Who goes on from an answer may end when that is no longer kept: its turns are kept again."""
        while link is not None:
            link.users += 1
            if link.users > 1:
                break
            self.nbytes += link.nbytes
            link = link.previous

    def _release(self, link: StoredTurn | None) -> None:
        while link is not None:
            link.users -= 1
            if link.users:
                break
            self.nbytes -= link.nbytes
            link = link.previous


def _bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
