"""A chat session on an engine: renders messages as a prompt and streams the output, reasoning apart from content."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ktx.chat_formats import Parser, Text
from ktx.engine.engine import Engine
from ktx.engine.prompt import PromptRenderer, RenderedPrompt
from ktx.engine.request import Event, Finished, Request, TokenEvent
from ktx.engine.sampler import SamplingParams
from ktx.utils.deprecation import deprecated_members


@deprecated_members(prompt="render", answer="stream", forget="reset", prompts="renderer")
@dataclass
class Session:
    """One client of an engine. A prompt that begins like an earlier one costs only its new part."""

    engine: Engine
    request: Request | None = None
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.renderer = PromptRenderer(self.engine.tokenizer, self.engine.model.config.model_type)

    def cancel(self) -> None:
        """Ends the running output; text that was streamed stays."""
        self.cancelled = True
        if self.request is not None:
            self.engine.cancel(self.request)

    def render(self, messages: Sequence[dict[str, str]], force_think: bool = False) -> RenderedPrompt:
        """Renders a conversation with the generation prompt. `force_think`: opens the reasoning block where the
        template does not.
        """
        return self.renderer.render(messages, force_think=force_think)

    def stream(self, prompt: RenderedPrompt, sampling: SamplingParams) -> Iterator[Text | Finished]:
        """Submits a prompt and yields text as it arrives, reasoning apart from content, then Finished.

        Closing the generator cancels the request.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.cancelled, parser = False, Parser(self.renderer.chat_format, thinking=prompt.thinking)
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

    def reset(self) -> None:
        """Empties the engine's prefix cache."""
        self.engine.reset_prefix_cache()


def _texts(events: Sequence[object]) -> Iterator[Text]:
    """Returns the text events: without tools there are no others."""
    return (event for event in events if isinstance(event, Text))
