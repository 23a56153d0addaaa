"""A conversation with an engine: its messages as a prompt, its answers as text, thinking apart."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ktx.chat_formats import Parser, Text
from ktx.engine.engine import Engine
from ktx.engine.prompt import PromptRenderer, RenderedPrompt
from ktx.engine.request import Event, Finished, Request, TokenEvent
from ktx.engine.sampler import SamplingParams


@dataclass
class Session:
    """One who talks to an engine: a prompt that begins like an earlier one costs only its new part."""

    engine: Engine
    request: Request | None = None
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.prompts = PromptRenderer(self.engine.tokenizer, self.engine.model.config.model_type)

    def cancel(self) -> None:
        """Ends the running answer; what was said stays."""
        self.cancelled = True
        if self.request is not None:
            self.engine.cancel(self.request)

    def prompt(self, messages: Sequence[dict[str, str]], force_think: bool = False) -> RenderedPrompt:
        """A conversation that ends where the assistant speaks."""
        return self.prompts.render(messages, force_think=force_think)

    def answer(self, prompt: RenderedPrompt, sampling: SamplingParams) -> Iterator[Text | Finished]:
        """Text as it comes, reasoning apart, then Finished."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.cancelled, parser = False, Parser(self.prompts.dialect, thinking=prompt.thinking)
        self.request = self.engine.submit(prompt.ids, sampling, events.put)
        try:
            while True:
                event = events.get()
                if isinstance(event, TokenEvent | Finished):
                    yield from _texts(parser.feed(event.text))
                if isinstance(event, Finished):
                    yield from _texts(parser.finish(event.reason != "stop"))
                    yield event
                    return
        finally:
            self.engine.cancel(self.request)
            self.request = None

    def forget(self) -> None:
        """Drops what the engine has kept of the conversation."""
        self.engine.clear()


def _texts(events: Sequence[Any]) -> Iterator[Text]:
    """Without tools there is nothing but text."""
    return (event for event in events if isinstance(event, Text))
