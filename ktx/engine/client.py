"""Ways to ask an engine: a loop over several prompts, and a listener for asyncio."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ktx.engine.request import Event, Finished, Request
from ktx.engine.sampler import SamplingParams
from ktx.ops.lora import Use

if TYPE_CHECKING:
    from ktx.engine.engine import Engine


Lora = str | Use | Sequence[str | Use] | None  # adapters by name, or with a factor; None: those that are in use


def generate(
    engine: Engine, prompts: Sequence[str | Sequence[int]], sampling: SamplingParams, lora: Lora = None
) -> Iterator[tuple[int, Event]]:
    """Pairs of a prompt's index and an event, as they come. Leaving early cancels what is left."""
    events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
    requests: list[Request] = []
    try:
        for i, prompt in enumerate(prompts):
            requests.append(engine.submit(engine.ids(prompt), sampling, _numbered(events, i), lora=lora))
        left = len(requests)
        while left:
            index, event = events.get()
            left -= isinstance(event, Finished)
            yield index, event
    finally:
        for request in requests:
            engine.cancel(request)


def _numbered(events: queue.SimpleQueue[tuple[int, Event]], number: int) -> Callable[[Event], None]:
    return lambda event: events.put((number, event))


class RequestGroup:
    """Several requests heard on the running event loop, as pairs of a number and an event. Requests are queued by `ask`; `close` cancels what is left."""

    def __init__(self, engine: Engine):
        self.engine, self.loop = engine, asyncio.get_running_loop()
        self.events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.requests: list[Request] = []
        self.num_running = 0

    def submit(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        constraint: Any = None,
        salt: bytes = b"",
        lora: Lora = None,
    ) -> Request:
        """Queues one more request; its number is how many there were before."""
        number = len(self.requests)
        request = self.engine.submit(
            prompt, sampling, lambda event: self._on_event(number, event), constraint, salt, lora
        )
        self.requests.append(request)
        self.num_running += 1
        return request

    def _on_event(self, number: int, event: Event) -> None:
        """On the engine's thread."""
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, (number, event))
        except RuntimeError:  # the loop is closed: nobody listens any more
            for request in self.requests:
                request.cancelled = True

    def __aiter__(self) -> RequestGroup:
        return self

    async def __anext__(self) -> tuple[int, Event]:
        if not self.num_running:
            raise StopAsyncIteration
        number, event = await self.events.get()
        self.num_running -= isinstance(event, Finished)
        return number, event

    def close(self) -> None:
        """Cancels what is not answered yet."""
        if self.num_running:
            self.num_running = 0
            for request in self.requests:
                self.engine.cancel(request)
        self.requests.clear()  # they know this by their sinks: a ring would hold their prompts until a collection of garbage


class Listener:
    """The events of one request on the running event loop. The request is queued when the listener is made; `close` cancels it."""

    def __init__(
        self,
        engine: Engine,
        prompt: Sequence[int],
        sampling: SamplingParams,
        constraint: Any = None,
        salt: bytes = b"",
        lora: Lora = None,
    ):
        self.chorus = RequestGroup(engine)
        self.request = self.chorus.submit(prompt, sampling, constraint, salt, lora)

    def __aiter__(self) -> Listener:
        return self

    async def __anext__(self) -> Event:
        return (await anext(self.chorus))[1]

    def close(self) -> None:
        """Cancels what is not answered yet."""
        self.chorus.close()

    async def __aenter__(self) -> Listener:
        return self

    async def __aexit__(self, *args: object) -> None:
        self.close()
