"""Clients of an engine: a blocking iterator over several prompts, and request groups for asyncio."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from ktx.engine.request import Constraint, Event, Finished, Request
from ktx.engine.sampler import SamplingParams
from ktx.utils.deprecation import deprecated_members
from ktx.weights.lora import AdapterUse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Adapters by name, or with a factor; None: the adapters in use.
Lora = str | AdapterUse | Sequence[str | AdapterUse] | None


class Submitter(Protocol):
    """What clients require of an engine."""

    tokenizer: PreTrainedTokenizerBase

    def submit(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        on_event: Callable[[Event], None],
        constraint: Constraint | None = None,
        salt: bytes = b"",
        lora: Lora = None,
    ) -> Request:
        """Queues a request, see `Engine.submit`."""

    def cancel(self, request: Request) -> None:
        """Ends a request early."""

    def tokenize(self, prompt: str | Sequence[int]) -> Sequence[int]:
        """Returns token ids."""


def generate(
    engine: Submitter, prompts: Sequence[str | Sequence[int]], sampling: SamplingParams, lora: Lora = None
) -> Iterator[tuple[int, Event]]:
    """Submits all prompts and yields pairs of a prompt's index and an event, in the order of the events.

    Closing the iterator cancels unfinished requests.

    Args:
        prompts: texts or token ids.
        sampling: the sampling parameters of all prompts.
        lora: the adapters, see `Engine.submit`.
    """
    events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
    requests: list[Request] = []
    try:
        for i, prompt in enumerate(prompts):
            requests.append(engine.submit(engine.tokenize(prompt), sampling, _with_index(events, i), lora=lora))
        num_running = len(requests)
        while num_running:
            index, event = events.get()
            num_running -= isinstance(event, Finished)
            yield index, event
    finally:
        for request in requests:
            engine.cancel(request)


def _with_index(events: queue.SimpleQueue[tuple[int, Event]], index: int) -> Callable[[Event], None]:
    """Returns a callback that queues each event with its request's index."""
    return lambda event: events.put((index, event))


@deprecated_members(ask="submit", left="num_running")
class RequestGroup:
    """Several requests whose events are iterated on the running event loop, as pairs of a request's index and an event.
    `submit` queues a request; `close` cancels the unfinished ones.
    """

    def __init__(self, engine: Submitter):
        self.engine, self.loop = engine, asyncio.get_running_loop()
        self.events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.requests: list[Request] = []
        self.num_running = 0

    def submit(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        constraint: Constraint | None = None,
        salt: bytes = b"",
        lora: Lora = None,
    ) -> Request:
        """Queues one more request; its index is the number of requests before it. For the arguments see
        `Engine.submit`.
        """
        index = len(self.requests)
        request = self.engine.submit(
            prompt, sampling, lambda event: self._on_event(index, event), constraint, salt, lora
        )
        self.requests.append(request)
        self.num_running += 1
        return request

    def _on_event(self, index: int, event: Event) -> None:
        """Passes an event to the event loop. Runs on the engine's thread."""
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, (index, event))
        except RuntimeError:  # the event loop is closed: no caller reads the events
            for request in self.requests:
                request.cancelled = True

    def __aiter__(self) -> RequestGroup:
        return self

    async def __anext__(self) -> tuple[int, Event]:
        if not self.num_running:
            raise StopAsyncIteration
        index, event = await self.events.get()
        self.num_running -= isinstance(event, Finished)
        return index, event

    def close(self) -> None:
        """Cancels the unfinished requests."""
        if self.num_running:
            self.num_running = 0
            for request in self.requests:
                self.engine.cancel(request)
        # The requests refer to this group by their callbacks: the reference cycle would retain their prompts until a
        # garbage collection.
        self.requests.clear()


class Listener:
    """Iterates over the events of one request on the running event loop. The constructor queues the request; `close`
    cancels it, also at the end of an `async with`.
    """

    def __init__(
        self,
        engine: Submitter,
        prompt: Sequence[int],
        sampling: SamplingParams,
        constraint: Constraint | None = None,
        salt: bytes = b"",
        lora: Lora = None,
    ):
        """Queues the request, as the only one of a group."""
        self.group = RequestGroup(engine)
        self.request = self.group.submit(prompt, sampling, constraint, salt, lora)

    def __aiter__(self) -> Listener:
        return self

    async def __anext__(self) -> Event:
        return (await anext(self.group))[1]

    def close(self) -> None:
        """Cancels the request if it is unfinished."""
        self.group.close()

    async def __aenter__(self) -> Listener:
        return self

    async def __aexit__(self, *args: object) -> None:
        self.close()
