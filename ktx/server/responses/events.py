"""Builds the output items of a response of /v1/responses and the events of its stream."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import Any

from ktx.engine.request import Event
from ktx.server import streaming
from ktx.server.output import Finish, LogprobFormatter, OutputParser, TextDelta, ToolCallDelta


@dataclass(frozen=True)
class ItemShape:
    """Names of the fields and events of one kind of text item."""

    list_key: str  # field of the item that holds its parts
    index_key: str  # field of the events that holds the index of the part
    part_type: str
    part_event: str  # prefix of the names of the part's events
    text_event: str  # prefix of the names of the text's events


ITEM_SHAPES = {
    "answer": ItemShape("content", "content_index", "output_text", "response.content_part", "response.output_text"),
    "think": ItemShape(
        "content", "content_index", "reasoning_text", "response.content_part", "response.reasoning_text"
    ),
    "summary": ItemShape(
        "summary",
        "summary_index",
        "summary_text",
        "response.reasoning_summary_part",
        "response.reasoning_summary_text",
    ),
}


class ResponseEvents:
    """Creates the numbered events of one response, and the items that the complete response holds.

    Args:
        base: the response object without its output.
        parser: parser of the request's output.
        formatter: formats log probabilities; None if the request has none.
        num_prompt_tokens: tokens of the prompt.
        summary: whether the client displays summaries of the reasoning. The model writes none, so the reasoning itself
            is sent as the summary.
        namespaces: namespace and own name of each function that has a namespace, by its qualified name.
    """

    def __init__(
        self,
        base: dict[str, Any],
        parser: OutputParser,
        formatter: LogprobFormatter | None,
        num_prompt_tokens: int,
        summary: bool,
        namespaces: dict[str, tuple[str, str]],
    ):
        """Starts without items."""
        self.base, self.parser, self.formatter, self.num_prompt_tokens, self.namespaces = (
            base,
            parser,
            formatter,
            num_prompt_tokens,
            namespaces,
        )
        # kind of text -> how it is sent
        self.shapes = ITEM_SHAPES | ({"think": ITEM_SHAPES["summary"]} if summary else {})
        self.sequence_number = -1
        self.items: list[dict[str, Any]] = []
        self.open_kind = ""  # kind of the incomplete item: answer or think
        self.text = ""  # its text so far
        self.logprobs: list[dict[str, Any]] = []  # log probabilities of its tokens

    def make_event(self, kind: str, **fields: Any) -> tuple[str, dict[str, Any]]:
        """Returns the next event: its name and its body."""
        self.sequence_number += 1
        return kind, {"type": kind, "sequence_number": self.sequence_number, **fields}

    def to_response(self) -> dict[str, Any]:
        """Returns the response object with the items so far."""
        return {**self.base, "output": list(self.items)}

    @property
    def ended(self) -> bool:
        """Whether the response has its final status."""
        return self.base["status"] in ("completed", "incomplete")

    def make_state_event(self, kind: str) -> tuple[str, dict[str, Any]]:
        """Returns an event that holds the whole response object."""
        return self.make_event(kind, response=self.to_response())

    def location(self, shape: ItemShape) -> dict[str, Any]:
        """Returns the fields of an event that locate the text in the output."""
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, shape.index_key: 0}

    def make_part(self, shape: ItemShape) -> dict[str, Any]:
        """Returns the part that holds the current text."""
        fields = {"annotations": [], "logprobs": list(self.logprobs)} if self.open_kind == "answer" else {}
        return {"type": shape.part_type, "text": self.text, **fields}

    def _begin_item(self, kind: str) -> list[tuple[str, dict[str, Any]]]:
        """Starts a text item and returns its first events. `kind`: answer (a message) or think (reasoning)."""
        self.open_kind, self.text, self.logprobs = kind, "", []
        shape = self.shapes[kind]
        if kind == "answer":
            item: dict[str, Any] = {
                "id": f"msg_{uuid.uuid4().hex}",
                "type": "message",
                "status": "in_progress",
                "role": "assistant",
                "content": [],
            }
        else:
            item = {
                "id": f"rs_{uuid.uuid4().hex}",
                "type": "reasoning",
                "summary": [],
                "content": [],
                "encrypted_content": None,
                "status": "in_progress",
            }
        self.items.append(item)
        return [
            self.make_event("response.output_item.added", output_index=len(self.items) - 1, item=dict(item)),
            self.make_event(f"{shape.part_event}.added", **self.location(shape), part=self.make_part(shape)),
        ]

    def close(self, status: str = "completed") -> list[tuple[str, dict[str, Any]]]:
        """Completes the open text item, if there is one, and returns its last events: text, part and item are done."""
        if not self.open_kind:
            return []
        item, shape = self.items[-1], self.shapes[self.open_kind]
        location, part = self.location(shape), self.make_part(shape)
        fields = {"logprobs": self.logprobs} if self.open_kind == "answer" else {}
        item |= {shape.list_key: [part], "status": status}
        self.open_kind = ""
        return [
            self.make_event(f"{shape.text_event}.done", **location, text=self.text, **fields),
            self.make_event(f"{shape.part_event}.done", **location, part=part),
            self.make_event("response.output_item.done", output_index=len(self.items) - 1, item=dict(item)),
        ]

    def on_text(self, delta: TextDelta) -> list[tuple[str, dict[str, Any]]]:
        """Returns the stream events of new text; text of another kind (answer, think) completes the open item and
        starts a new one.
        """
        events = []
        if self.open_kind != delta.kind:
            events = self.close() + self._begin_item(delta.kind)
        self.text += delta.text
        shape, fields = self.shapes[delta.kind], {}
        if delta.kind == "answer":
            fields = {"logprobs": self.formatter.content(delta.tokens)["content"] if self.formatter else []}
            self.logprobs += fields["logprobs"]
        return [
            *events,
            self.make_event(f"{shape.text_event}.delta", **self.location(shape), delta=delta.text, **fields),
        ]

    def on_tool_call(self, call: ToolCallDelta) -> list[tuple[str, dict[str, Any]]]:
        """Returns the events of a tool call, which is one complete item, with all events that a client expects of a
        call that arrives in fragments.
        """
        events = self.close()
        namespace, name = self.namespaces.get(call.name, (None, call.name))
        item = {
            "id": f"fc_{uuid.uuid4().hex}",
            "type": "function_call",
            "status": "in_progress",
            "call_id": call.id,
            "name": name,
            "arguments": "",
            **({"namespace": namespace} if namespace else {}),
        }
        index = len(self.items)
        completed = {**item, "status": "completed", "arguments": call.arguments}
        self.items.append(completed)
        location = {"item_id": item["id"], "output_index": index}
        return [
            *events,
            self.make_event("response.output_item.added", output_index=index, item=item),
            self.make_event("response.function_call_arguments.delta", **location, delta=call.arguments),
            self.make_event("response.function_call_arguments.done", **location, name=name, arguments=call.arguments),
            self.make_event("response.output_item.done", output_index=index, item=completed),
        ]

    def on_finish(self, finish: Finish) -> list[tuple[str, dict[str, Any]]]:
        """Sets the final status and the usage, and returns the last events. Raises APIError if the request failed."""
        streaming.raise_for_finish(finish.event)
        truncated = finish.reason == "length"
        events = self.close("incomplete" if truncated else "completed")
        if not self.items:  # an empty answer has an empty message
            events += self._begin_item("answer") + self.close("incomplete" if truncated else "completed")
        usage = finish.event.usage
        self.base |= {
            "status": "incomplete" if truncated else "completed",
            "completed_at": None if truncated else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if truncated else None,
            "usage": {
                "input_tokens": self.num_prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached},
                "output_tokens": usage.answer,
                "output_tokens_details": {"reasoning_tokens": finish.reasoning_tokens},
                "total_tokens": self.num_prompt_tokens + usage.answer,
            },
        }
        return [*events, self.make_state_event("response.incomplete" if truncated else "response.completed")]

    def feed(self, event: Event) -> list[tuple[str, dict[str, Any]]]:
        """Returns the stream events of one event of the engine, none while the parser holds its text back."""
        events: list[tuple[str, dict[str, Any]]] = []
        for delta in self.parser.feed(event):
            events += (
                self.on_text(delta)
                if isinstance(delta, TextDelta)
                else self.on_tool_call(delta)
                if isinstance(delta, ToolCallDelta)
                else self.on_finish(delta)
            )
        return events
