"""Where an answer goes on inside the last message, which is the assistant's.

The template writes the whole conversation with a mark behind the message's text; what stands before the mark is the prompt.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ktx.chat_formats import ChatFormat, opened
from ktx.errors import UsageError

Message = Mapping[str, Any]
# what the template writes of messages, and whether the assistant speaks next
Write = Callable[[Sequence[Message], bool], str]


def render_continuation(
    write: Write, messages: Sequence[Message], dialect: ChatFormat, template: str, end: str
) -> tuple[str, str, bool]:
    """The prompt, the text at its end that goes on, and whether that is reasoning. `end`: a character that no message holds.

    UsageError where the last message cannot go on, or the template writes it so that its end is not found.
    """
    *before, last = messages
    if last["role"] != "assistant":
        raise UsageError("an answer can go on with the last message only if that is the assistant's")
    if last.get("tool_calls"):
        raise UsageError("the last message calls functions: an answer cannot go on with it")
    reasoning, content = _parts(last, dialect)
    thinking = content is None
    said, over = (reasoning, "") if content is None else (content, reasoning)
    text = write([*before, _marked(last, said, over, thinking, dialect, end)], False)
    *pieces, _ = text.split(end)
    if len(pieces) == 1 + bool(over) and pieces[-1].endswith(said.lstrip()):
        text = _behind(write, before, "".join(pieces), said)
    elif reasoning or thinking:
        text = _block(write, before, dialect, template, over) + said
    else:
        raise UsageError("the model's chat template changes the last message's text: an answer cannot go on with it")
    return text, said if said.strip() else "", thinking


def _parts(message: Message, dialect: ChatFormat) -> tuple[str, str | None]:
    """Reasoning, also where it stands in the content, and the answer; None for one that has not begun."""
    reasoning, content = message.get("reasoning_content") or "", message["content"] or ""
    opening, closing = dialect.think
    if opening and not reasoning and content.lstrip().startswith(opening):
        reasoning, closed, content = content.lstrip()[len(opening) :].lstrip("\n").partition(closing)
        if not closed:
            return reasoning, None
        reasoning, content = reasoning.rstrip("\n"), content.lstrip("\n")
    elif reasoning.strip() and not content:
        return reasoning, None
    return reasoning if reasoning.strip() else "", content


def _marked(message: Message, said: str, over: str, thinking: bool, dialect: ChatFormat, end: str) -> Message:
    """The message with `end` behind what goes on, where nothing strips it, and inside reasoning that is over, which a template may leave out."""
    at = len(over) - len(over.lstrip()) + 1
    reasoning = said + end if thinking else over and over[:at] + end + over[at:]
    keys = ("reasoning_content", dialect.thinking_key) if reasoning else ()
    content = "" if thinking else said + end
    return {**message, "content": content} | {key: reasoning for key in keys if key}


def _behind(write: Write, before: Sequence[Message], text: str, said: str) -> str:
    """The last turn of `text` behind what the template writes of the messages `before` it alone.

    Mostly that is how `text` begins. But Mistral's leaves out the system message where the user's is not the last one, and
    Kimi's the reasoning of a turn's calls: there the answer goes on behind what the model has read so far.
    """
    if not before or text.startswith(begun := write(before, False)):
        return text
    turns = text[: len(text) - len(said.lstrip())]
    shared = bisect_left(range(1, len(begun) + 1), True, key=lambda count: begun[-count:] not in turns)
    common = begun[len(begun) - shared :]
    if not shared or (before[-1]["content"] or "").strip() not in common:
        return text
    return begun + text[turns.rindex(common) + shared :]


def _block(write: Write, before: Sequence[Message], dialect: ChatFormat, template: str, over: str) -> str:
    """A prompt that ends inside the reasoning block, or behind it where the reasoning is `over`: for templates that write none of messages."""
    text, (opening, closing) = write(before, True), dialect.think
    if not opened(text, dialect):
        if not opening or opening not in template or text.rstrip().endswith(closing):
            raise UsageError("the model's chat template writes no reasoning here: leave it out of the last message")
        text += opening + ("\n" if f"{opening}\\n" in template else "")
    line = "\n" if text.endswith("\n") else ""
    return f"{text}{over.strip()}{line}{closing}{line}{line}" if over else text
