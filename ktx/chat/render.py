"""Formats a chat: streams text, dims reasoning, prints the statistics after an answer."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from ktx.chat_formats import Text
from ktx.engine.request import Finished

DIM_STYLE, RESET_STYLE = "\x1b[2m", "\x1b[0m"


class Printer:
    """Writes events to a stream; colors only on a terminal that supports them. `fold` replaces reasoning by its number
    of characters.
    """

    def __init__(self, out: TextIO, fold: bool = False):
        self.out, self.fold = out, fold
        self.color = out.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"

    def show(self, events: Iterable[Text | Finished]) -> Finished | None:
        """Prints an output as it arrives and returns its Finished event; None if the output has none.

        Reasoning is dimmed and marked, or counted instead of printed with `fold`.
        """
        kind, num_reasoning_chars, finished = "answer", 0, None
        for event in events:
            if isinstance(event, Finished):
                finished = event
                continue
            if event.kind != kind:
                self._switch(event.kind, num_reasoning_chars)
                kind = event.kind
            if kind == "think":
                num_reasoning_chars += len(event.text)
            if kind == "answer" or not self.fold:
                self.out.write(event.text)
            self.out.flush()
        if kind == "think":
            self._switch("answer", num_reasoning_chars)
        self.out.write("\n")
        self.out.flush()
        return finished

    def _switch(self, kind: str, num_reasoning_chars: int) -> None:
        """Prints the transition to reasoning ("think") or to the answer."""
        if kind == "think":
            self.out.write((DIM_STYLE if self.color else "") + ("" if self.fold else "[thinking] "))
        else:
            self.out.write(
                f"[thought for {num_reasoning_chars} characters, /fold shows them]" if self.fold else "\n[/thinking]"
            )
            self.out.write((RESET_STYLE if self.color else "") + "\n\n")

    def dim(self, text: str) -> None:
        """Prints a dimmed line."""
        self.out.write(f"{DIM_STYLE}{text}{RESET_STYLE}\n" if self.color else f"{text}\n")
        self.out.flush()


def format_stats(last: Finished, engine: Any, bandwidth: float | None) -> str:
    """Returns the statistics of an output: prompt, answer, first token, prefix cache, context, and the weight bandwidth
    relative to the memory's.
    """
    usage, model = last.usage, engine.model
    context_left = engine.context - usage.prompt - usage.answer
    fields = [
        f"prompt {usage.prompt - usage.cached} tok {usage.prompt_tokens_per_s:.1f} tok/s",
        f"answer {usage.answer} tok {usage.output_tokens_per_s:.1f} tok/s",
        f"first token {usage.first_token_seconds:.2f} s",
        f"cached {usage.cached}",
        f"context left {context_left}",
    ]
    if usage.output_tokens_per_s:
        gb_per_s = model.ktx.bytes_per_token * usage.output_tokens_per_s / 1e9
        bandwidth_share = f" ({gb_per_s / bandwidth:.0%} of {bandwidth:.1f} GB/s read)" if bandwidth else ""
        fields.append(f"weights at {gb_per_s:.1f} GB/s{bandwidth_share}")
    if last.reason == "length":
        fields.append("cut at --max_new_tokens" if context_left > 0 else "context is full")
    elif last.reason != "stop":
        fields.append({"cancelled": "stopped"}.get(last.reason, f"failed: {last.error}"))
    return " · ".join(fields)


def print_note(text: str) -> None:
    """Prints a message that is not part of an answer to standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
