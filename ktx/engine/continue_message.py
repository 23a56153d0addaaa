"""Renders prompts for `continue_final_message`: the output continues the last message, which is the assistant's.

The template renders the whole conversation with a sentinel after the message's text; everything before the sentinel is
the prompt.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ktx.chat_formats import ChatFormat, ends_in_reasoning
from ktx.errors import UsageError

Message = Mapping[str, Any]
# (messages, add_generation_prompt) -> the text that the template renders
RenderFn = Callable[[Sequence[Message], bool], str]


def render_continuation(
    render: RenderFn, messages: Sequence[Message], chat_format: ChatFormat, template: str, sentinel: str
) -> tuple[str, str, bool]:
    """Renders a conversation whose last message the output continues.

    Args:
        render: renders messages with the chat template.
        messages: the conversation; the last one is the assistant's.
        chat_format: the model's chat format.
        template: the chat template's text.
        sentinel: a character that no message contains.

    Returns:
        The prompt, the text at its end that the output continues, and whether that is reasoning.

    Raises:
        UsageError: the last message cannot be continued, or the template changes its text so that its end is not found.
    """
    *history, last = messages
    if last["role"] != "assistant":
        raise UsageError("only a last message of the assistant can be continued")
    if last.get("tool_calls"):
        raise UsageError("the last message has tool calls: it cannot be continued")
    reasoning, content = _split_reasoning(last, chat_format)
    thinking = content is None
    prefill_text, closed_reasoning = (reasoning, "") if content is None else (content, reasoning)
    text = render(
        [*history, _with_sentinel(last, prefill_text, closed_reasoning, thinking, chat_format, sentinel)], False
    )
    *parts, _ = text.split(sentinel)
    # The template has rendered every text with its sentinel: the text to continue, and the closed reasoning if any.
    if len(parts) == 1 + bool(closed_reasoning) and parts[-1].endswith(prefill_text.lstrip()):
        text = _append_last_turn(render, history, "".join(parts), prefill_text)
    elif reasoning or thinking:
        text = _append_reasoning(render, history, chat_format, template, closed_reasoning) + prefill_text
    else:
        raise UsageError("the model's chat template changes the last message's text: it cannot be continued")
    return text, prefill_text if prefill_text.strip() else "", thinking


def _split_reasoning(message: Message, chat_format: ChatFormat) -> tuple[str, str | None]:
    """Returns a message's reasoning, which clients also send between marks in the content, and the content; None for
    content that has not begun, because then the output continues the reasoning.
    """
    reasoning, content = message.get("reasoning_content") or "", message["content"] or ""
    open_mark, close_mark = chat_format.reasoning_marks
    if open_mark and not reasoning and content.lstrip().startswith(open_mark):
        reasoning, found_close, content = content.lstrip()[len(open_mark) :].lstrip("\n").partition(close_mark)
        if not found_close:
            return reasoning, None
        reasoning, content = reasoning.rstrip("\n"), content.lstrip("\n")
    elif reasoning.strip() and not content:
        return reasoning, None
    return reasoning if reasoning.strip() else "", content


def _with_sentinel(
    message: Message, prefill_text: str, closed_reasoning: str, thinking: bool, chat_format: ChatFormat, sentinel: str
) -> Message:
    """Marks with `sentinel` where the text to continue ends, to find that place in the rendered prompt.

    Closed reasoning gets one too, after its first visible character, because templates strip the ends. It shows whether
    the template renders the reasoning.
    """
    after_first_visible = len(closed_reasoning) - len(closed_reasoning.lstrip()) + 1
    reasoning = (
        prefill_text + sentinel
        if thinking
        else closed_reasoning
        and closed_reasoning[:after_first_visible] + sentinel + closed_reasoning[after_first_visible:]
    )
    keys = ("reasoning_content", chat_format.reasoning_key) if reasoning else ()
    content = "" if thinking else prefill_text + sentinel
    return {**message, "content": content} | {key: reasoning for key in keys if key}


def _append_last_turn(render: RenderFn, history: Sequence[Message], text: str, prefill_text: str) -> str:
    """Returns the last turn of `text` appended to what the template renders of the messages `history` alone.

    Usually that is how `text` begins. But Mistral's template leaves out the system message where the user's is not the
    last one, and Kimi's leaves out the reasoning of a turn's calls: there the output continues after the text that the
    model has read so far.
    """
    if not history or text.startswith(rendered_history := render(history, False)):
        return text
    turns = text[: len(text) - len(prefill_text.lstrip())]
    # length of the longest end of the rendered history that also occurs in `turns`
    num_common = bisect_left(
        range(1, len(rendered_history) + 1), True, key=lambda count: rendered_history[-count:] not in turns
    )
    common = rendered_history[len(rendered_history) - num_common :]
    # a common end without all of the last message's text matches by chance
    if not num_common or (history[-1]["content"] or "").strip() not in common:
        return text
    return rendered_history + text[turns.rindex(common) + num_common :]


def _append_reasoning(
    render: RenderFn, history: Sequence[Message], chat_format: ChatFormat, template: str, closed_reasoning: str
) -> str:
    """Returns the prompt up to where the output continues, for templates that do not render a message's reasoning:
    `history` with an opened reasoning block, in which the caller appends the reasoning to continue; or, if the
    message's reasoning is complete (`closed_reasoning`), with that and the mark that closes the block.
    """
    text = render(history, True)  # True: starts the assistant's turn
    open_mark, close_mark = chat_format.reasoning_marks
    if not ends_in_reasoning(text, chat_format):
        if not open_mark or open_mark not in template or text.rstrip().endswith(close_mark):
            raise UsageError("the model's chat template renders no reasoning here: leave it out of the last message")
        text += open_mark + ("\n" if f"{open_mark}\\n" in template else "")
    line_break = "\n" if text.endswith("\n") else ""
    return (
        f"{text}{closed_reasoning.strip()}{line_break}{close_mark}{line_break}{line_break}"
        if closed_reasoning
        else text
    )
