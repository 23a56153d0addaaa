"""An answer of /v1/responses: the items it holds, and the events that tell of them while they grow."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import Any

from ktx.server import streaming
from ktx.server.output import Finish, LogprobFormatter, OutputParser, TextDelta, ToolCallDelta


@dataclass(frozen=True)
class ItemShape:
    """Where a text stands in its item, and what its events are called."""

    place: str  # the list in the item
    index: str
    type: str
    part: str
    text: str


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
    """The events of one answer, numbered; the items they build are what the whole answer holds.

    `summary`: the client shows summaries of reasoning. There are none, so the reasoning itself stands in their place.
    """

    def __init__(
        self,
        base: dict[str, Any],
        turn: OutputParser,
        tokens: LogprobFormatter | None,
        asked: int,
        summary: bool,
        spaces: dict[str, tuple[str, str]],
    ):
        self.base, self.turn, self.tokens, self.asked, self.spaces = base, turn, tokens, asked, spaces
        self.forms = ITEM_SHAPES | ({"think": ITEM_SHAPES["summary"]} if summary else {})
        self.number = -1
        self.items: list[dict[str, Any]] = []
        self.open = ""  # kind of the item that is being written: answer or think
        self.text = ""
        self.logprobs: list[Any] = []

    def event(self, kind: str, **more: Any) -> tuple[str, dict[str, Any]]:
        self.number += 1
        return kind, {"type": kind, "sequence_number": self.number, **more}

    def to_response(self) -> dict[str, Any]:
        """The answer as it is now."""
        return {**self.base, "output": list(self.items)}

    @property
    def ended(self) -> bool:
        return self.base["status"] in ("completed", "incomplete")

    def state(self, kind: str) -> tuple[str, dict[str, Any]]:
        return self.event(kind, response=self.to_response())

    def place(self, form: ItemShape) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, form.index: 0}

    def part(self, form: ItemShape) -> dict[str, Any]:
        more = {"annotations": [], "logprobs": list(self.logprobs)} if self.open == "answer" else {}
        return {"type": form.type, "text": self.text, **more}

    def _begin(self, kind: str) -> list[tuple[str, dict[str, Any]]]:
        self.open, self.text, self.logprobs = kind, "", []
        form = self.forms[kind]
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
            self.event("response.output_item.added", output_index=len(self.items) - 1, item=dict(item)),
            self.event(f"{form.part}.added", **self.place(form), part=self.part(form)),
        ]

    def close(self, status: str = "completed") -> list[tuple[str, dict[str, Any]]]:
        if not self.open:
            return []
        item, form = self.items[-1], self.forms[self.open]
        place, part = self.place(form), self.part(form)
        more = {"logprobs": self.logprobs} if self.open == "answer" else {}
        item |= {form.place: [part], "status": status}
        self.open = ""
        return [
            self.event(f"{form.text}.done", **place, text=self.text, **more),
            self.event(f"{form.part}.done", **place, part=part),
            self.event("response.output_item.done", output_index=len(self.items) - 1, item=dict(item)),
        ]

    def say(self, told: TextDelta) -> list[tuple[str, dict[str, Any]]]:
        out = []
        if self.open != told.kind:
            out = self.close() + self._begin(told.kind)
        self.text += told.text
        form, more = self.forms[told.kind], {}
        if told.kind == "answer":
            more = {"logprobs": self.tokens.content(told.choices)["content"] if self.tokens else []}
            self.logprobs += more["logprobs"]
        return [*out, self.event(f"{form.text}.delta", **self.place(form), delta=told.text, **more)]

    def call(self, told: ToolCallDelta) -> list[tuple[str, dict[str, Any]]]:
        out = self.close()
        space, name = self.spaces.get(told.name, (None, told.name))
        item = {
            "id": f"fc_{uuid.uuid4().hex}",
            "type": "function_call",
            "status": "in_progress",
            "call_id": told.id,
            "name": name,
            "arguments": "",
            **({"namespace": space} if space else {}),
        }
        at = len(self.items)
        whole = {**item, "status": "completed", "arguments": told.arguments}
        self.items.append(whole)
        place = {"item_id": item["id"], "output_index": at}
        return [
            *out,
            self.event("response.output_item.added", output_index=at, item=item),
            self.event("response.function_call_arguments.delta", **place, delta=told.arguments),
            self.event("response.function_call_arguments.done", **place, name=name, arguments=told.arguments),
            self.event("response.output_item.done", output_index=at, item=whole),
        ]

    def end(self, told: Finish) -> list[tuple[str, dict[str, Any]]]:
        streaming.raise_for_finish(told.finished)
        cut = told.reason == "length"
        out = self.close("incomplete" if cut else "completed")
        if not self.items:  # an answer without a word is one all the same
            out += self._begin("answer") + self.close("incomplete" if cut else "completed")
        usage = told.finished.usage
        self.base |= {
            "status": "incomplete" if cut else "completed",
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": self.asked,
                "input_tokens_details": {"cached_tokens": usage.cached},
                "output_tokens": usage.answer,
                "output_tokens_details": {"reasoning_tokens": told.reasoning_tokens},
                "total_tokens": self.asked + usage.answer,
            },
        }
        return [*out, self.state("response.incomplete" if cut else "response.completed")]

    def feed(self, event: Any) -> list[tuple[str, dict[str, Any]]]:
        out: list[tuple[str, dict[str, Any]]] = []
        for told in self.turn.feed(event):
            out += (
                self.say(told)
                if isinstance(told, TextDelta)
                else self.call(told)
                if isinstance(told, ToolCallDelta)
                else self.end(told)
            )
        return out
