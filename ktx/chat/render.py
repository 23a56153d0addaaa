"""How a chat looks: streaming text, dim thinking, the line of numbers after an answer."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from ktx.chat_formats import Text
from ktx.engine.request import Finished

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


class Printer:
    """Writes events to a stream; colours only on a terminal that wants them. `fold` shows thinking as a count."""

    def __init__(self, out: TextIO, fold: bool = False):
        self.out, self.fold = out, fold
        self.colour = out.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"

    def show(self, events: Iterable[Text | Finished]) -> Finished | None:
        """Prints an answer as it comes and returns its Finished."""
        kind, thought, done = "answer", 0, None
        for event in events:
            if isinstance(event, Finished):
                done = event
                continue
            if event.kind != kind:
                self._switch(event.kind, thought)
                kind = event.kind
            if kind == "think":
                thought += len(event.text)
            if kind == "answer" or not self.fold:
                self.out.write(event.text)
            self.out.flush()
        if kind == "think":
            self._switch("answer", thought)
        self.out.write("\n")
        self.out.flush()
        return done

    def _switch(self, kind: str, thought: int) -> None:
        if kind == "think":
            self.out.write((DIM if self.colour else "") + ("" if self.fold else "[thinking] "))
        else:
            self.out.write(f"[thought for {thought} characters, /fold shows them]" if self.fold else "\n[/thinking]")
            self.out.write((PLAIN if self.colour else "") + "\n\n")

    def dim(self, text: str) -> None:
        self.out.write(f"{DIM}{text}{PLAIN}\n" if self.colour else f"{text}\n")
        self.out.flush()


def stats_line(last: Finished, engine: Any, bandwidth: float | None) -> str:
    """Prompt, answer, first token, cache, context, and how near the answer came to the memory's speed."""
    used, model = last.usage, engine.model
    left = engine.context - used.prompt - used.answer
    parts = [
        f"prompt {used.prompt - used.cached} tok {used.prompt_speed:.1f} tok/s",
        f"answer {used.answer} tok {used.answer_speed:.1f} tok/s",
        f"first token {used.first_token_seconds:.2f} s",
        f"cached {used.cached}",
        f"context left {left}",
    ]
    if used.answer_speed:
        rate = model.ktx.bytes_per_token * used.answer_speed / 1e9
        share = f" ({rate / bandwidth:.0%} of {bandwidth:.1f} GB/s read)" if bandwidth else ""
        parts.append(f"weights at {rate:.1f} GB/s{share}")
    if last.reason == "length":
        parts.append("cut at --max_new_tokens" if left > 0 else "context is full")
    elif last.reason != "stop":
        parts.append({"cancelled": "stopped"}.get(last.reason, f"failed: {last.error}"))
    return " · ".join(parts)


def note(text: str) -> None:
    """A message that is not part of any answer."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
