"""The in-memory store of responses of /v1/responses, which later requests can continue or retrieve.

It keeps the newest responses; each is visible only to the API key that created it.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

MAX_STORE_BYTES = 64 << 20  # max size of the store
ID_BYTES = 256  # counted per item id, because several tables hold it
Item = dict[str, Any]


@dataclass(eq=False)
class StoredTurn:
    """A turn of a conversation: the items of the request and of the response (JSON lists), and the previous turn.

    `ref_count` counts the stored response that the turn belongs to, and the later turns that refer to it; the turn is
    freed when it reaches zero.
    """

    input_items: bytes
    output: bytes
    num_ids: int
    previous: StoredTurn | None
    ref_count: int = 0

    @property
    def nbytes(self) -> int:
        """Size of the turn without the previous ones, in bytes."""
        return len(self.input_items) + len(self.output) + ID_BYTES * self.num_ids

    def chain(self) -> Iterator[StoredTurn]:
        """Yields this turn and the previous ones, the newest first."""
        turn: StoredTurn | None = self
        while turn is not None:
            yield turn
            turn = turn.previous

    def own_items(self) -> list[Item]:
        """Returns the items of this turn."""
        return [*json.loads(self.input_items), *json.loads(self.output)]

    def items(self) -> list[Item]:
        """Returns the items of the conversation up to the end of this turn."""
        return [item for turn in reversed(list(self.chain())) for item in turn.own_items()]


@dataclass(eq=False)
class StoredResponse:
    """A stored response: its JSON object without the output items, which the turn holds."""

    owner: bytes
    body: bytes
    turn: StoredTurn
    item_ids: tuple[str, ...]

    def to_dict(self) -> Item:
        """Returns the response object."""
        return json.loads(self.body) | {"output": json.loads(self.turn.output)}

    def input_history(self) -> list[Item]:
        """Returns the items that the response answered: those of the previous turns and of its own request."""
        earlier = self.turn.previous.items() if self.turn.previous else []
        return [*earlier, *json.loads(self.turn.input_items)]


class ResponseStore:
    """Stores responses up to a number and a size; the oldest are evicted first. Not thread-safe.

    `owner` is the digest of an API key; responses of other owners are not found.

    Args:
        max_responses: max number of responses; 0: the store is disabled.
        max_bytes: max size in bytes.
    """

    def __init__(self, max_responses: int, max_bytes: int = MAX_STORE_BYTES):
        self.max_responses, self.max_bytes, self.nbytes = max_responses, max_bytes, 0
        self.responses: OrderedDict[str, StoredResponse] = OrderedDict()
        self.by_item: dict[tuple[bytes, str], StoredResponse] = {}  # (owner, item id) -> newest response with it

    def put(self, owner: bytes, response: Item, input_items: list[Item], previous: StoredTurn | None) -> None:
        """Stores a response and evicts the oldest ones if the store is full.

        Args:
            owner: digest of the API key.
            response: the response object.
            input_items: items of the request; each has an id.
            previous: the turn that the request continues.
        """
        output = response["output"]
        item_ids = tuple(dict.fromkeys(item["id"] for item in (*input_items, *output)))
        turn = StoredTurn(_to_json(input_items), _to_json(output), len(item_ids), previous)
        stored = StoredResponse(owner, _to_json(response | {"output": []}), turn, item_ids)
        self._acquire(turn)
        self.responses[response["id"]] = stored
        self.nbytes += len(stored.body)
        self.by_item |= dict.fromkeys(((owner, item_id) for item_id in item_ids), stored)
        while len(self.responses) > self.max_responses or self.nbytes > self.max_bytes:
            self._drop(next(iter(self.responses)))

    def find(self, owner: bytes, response_id: str) -> StoredResponse | None:
        """Returns the response with an id; None if the owner has none."""
        response = self.responses.get(response_id)
        return response if response is not None and response.owner == owner else None

    def delete(self, owner: bytes, response_id: str) -> bool:
        """Deletes a response and returns whether it existed. Later turns keep the turns that they continue."""
        if self.find(owner, response_id) is None:
            return False
        self._drop(response_id)
        return True

    def items(self, owner: bytes, item_ids: Iterable[str]) -> dict[str, Item]:
        """Returns the stored items with the given ids, by id."""
        holders = {item_id: self.by_item[owner, item_id] for item_id in item_ids if (owner, item_id) in self.by_item}
        found: dict[str, Item] = {}
        for response in dict.fromkeys(holders.values()):
            found |= {item["id"]: item for item in response.turn.own_items() if holders.get(item["id"]) is response}
        return found

    def _drop(self, response_id: str) -> None:
        """Removes a response from all tables."""
        dropped = self.responses.pop(response_id)
        self.nbytes -= len(dropped.body)
        for item_id in dropped.item_ids:
            if self.by_item.get((dropped.owner, item_id)) is dropped:
                del self.by_item[dropped.owner, item_id]
        self._release(dropped.turn)

    def _acquire(self, turn: StoredTurn | None) -> None:
        """Adds a reference to a turn; the first one also adds a reference to the previous turn.

        A request may end after the response that it continues was evicted; its turns are then counted again.
        """
        while turn is not None:
            turn.ref_count += 1
            if turn.ref_count > 1:
                break
            self.nbytes += turn.nbytes
            turn = turn.previous

    def _release(self, turn: StoredTurn | None) -> None:
        """Removes a reference to a turn; the last one also removes the reference to the previous turn."""
        while turn is not None:
            turn.ref_count -= 1
            if turn.ref_count:
                break
            self.nbytes -= turn.nbytes
            turn = turn.previous


def _to_json(value: Any) -> bytes:
    """Returns compact JSON in UTF-8, whose length counts towards the store's size."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
