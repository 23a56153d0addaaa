"""/v1/responses, without memory: each request brings its whole conversation. Source of shapes: OpenAI's reference and the Open Responses schema."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from ktx.engine.asking import Chorus
from ktx.server import sending
from ktx.server.asked import Talk, asked_of, begin, check_room, effort_words, sampling_of
from ktx.server.errors import Problem
from ktx.server.fields import Format, Respond, ResponseChoice, ResponseNamespace, ResponseTool
from ktx.server.served import Served
from ktx.server.turn import Called, Ended, Said, Tokens, Turn

INCLUDED = (
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
)  # the second is never there, and may be asked for


async def answer(served: Served, fields: Respond, request: Request) -> Response:
    model = served.named(fields.model)
    served.ready()
    for word in fields.include or ():
        if word not in INCLUDED:
            raise Problem(400, f"include knows {', '.join(INCLUDED)}, not {word!r}", "include")
    wanted = INCLUDED[0] in (fields.include or ()) or bool(fields.top_logprobs)
    sampling = sampling_of(
        served,
        fields.model_dump(exclude_none=True, include={"temperature", "top_p"}),
        fields.max_output_tokens,
        logprobs=(fields.top_logprobs or 0) if wanted else None,
    )
    tools, spaces = _tools(fields)
    choice = fields.tool_choice.name if isinstance(fields.tool_choice, ResponseChoice) else fields.tool_choice or "auto"
    names = [tool["function"]["name"] for tool in tools]
    if choice == "required" and not names or choice not in ("auto", "none", "required", *names):
        raise Problem(400, f"tool_choice is {choice!r}, tools are {names}", "tool_choice")
    effort = fields.reasoning.effort if fields.reasoning else None
    talk = Talk(
        messages_of(fields),
        tools,
        choice,
        fields.parallel_tool_calls is not False,
        effort_words(effort),
        _format(fields),
    )
    ask = await asked_of(served, talk, sampling)
    check_room(served, ask.rendered.ids, fields.max_output_tokens)
    chorus = await begin(served, [ask])
    writer = Writer(
        _base(fields, model, sampling),
        Turn(ask.parser(served)),
        Tokens(chorus.engine.tokenizer) if wanted else None,
        len(ask.rendered.ids),
        bool(fields.reasoning and (fields.reasoning.summary or fields.reasoning.generate_summary)),
        spaces,
    )
    if not fields.stream:
        return await sending.whole(request, chorus, _whole(chorus, writer))
    return sending.events(_stream(chorus, writer), chorus, request.url.path, served.settings.ping)


def _tools(fields: Respond) -> tuple[list[dict[str, Any]], dict[str, tuple[str, str]]]:
    """What the model is told of, and the namespace and own name of each function that has one."""
    tools: list[dict[str, Any]] = []
    spaces: dict[str, tuple[str, str]] = {}
    for tool in fields.tools or ():
        space = tool.name if isinstance(tool, ResponseNamespace) else None
        for one in tool.tools if isinstance(tool, ResponseNamespace) else [tool]:
            if isinstance(one, ResponseTool):
                name = _spaced(space, one.name)
                if space:
                    spaces[name] = (space, one.name)
                told = one.model_dump(exclude_none=True, exclude={"type"}) | {"name": name}
                tools.append({"type": "function", "function": told})
    return tools, spaces


def _spaced(space: str | None, name: str) -> str:
    return f"{space}__{name}" if space else name


def messages_of(fields: Respond) -> list[dict[str, Any]]:
    """Items of the input as chat messages; calls of one turn stand in one message, with the reasoning before them."""
    told: list[dict[str, Any]] = [{"role": "system", "content": fields.instructions}] if fields.instructions else []
    if isinstance(fields.input, str):
        return [*told, {"role": "user", "content": fields.input}]
    thought = ""
    for at, item in enumerate(fields.input):
        kind = item.get("type", "message")
        if kind == "reasoning":
            parts = [*(item.get("content") or ()), *(item.get("summary") or ())]
            thought = "".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))
            continue
        if kind == "function_call_output":
            told.append(
                {
                    "role": "tool",
                    "tool_call_id": str(item.get("call_id", "")),
                    "content": _content(item.get("output"), at),
                }
            )
        elif kind == "function_call":
            call = {
                "id": str(item.get("call_id", "")),
                "type": "function",
                "function": {
                    "name": _spaced(item.get("namespace"), str(item.get("name", ""))),
                    "arguments": str(item.get("arguments") or "{}"),
                },
            }
            if not told or told[-1]["role"] != "assistant":
                told.append({"role": "assistant", "content": ""})
            told[-1].setdefault("tool_calls", []).append(call)
            if thought:
                told[-1]["reasoning_content"], thought = thought, ""
        elif kind == "message" and item.get("role") in ("user", "assistant", "system", "developer"):
            told.append({"role": item["role"], "content": _content(item.get("content"), at)})
            if thought and item["role"] == "assistant":
                told[-1]["reasoning_content"], thought = thought, ""
        elif kind == "item_reference":
            raise Problem(
                400,
                f"input[{at}] is the id of an item, {item.get('id')!r}, and this server keeps none: send items whole, "
                "as clients do that are told store: false",
                "input",
            )
        else:
            raise Problem(
                400, f"input[{at}] is a {kind!r} of role {item.get('role')!r}, which is not understood", "input"
            )
    if not any(message["role"] != "system" for message in told):
        raise Problem(400, "input holds no message", "input")
    return told


def _content(content: Any, at: int) -> str:
    if isinstance(content, str):
        return content
    parts = []
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text", part.get("refusal")) if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise Problem(
                400,
                f"input[{at}] holds a {part.get('type') if isinstance(part, dict) else type(part).__name__!r}; only text is understood",
                "input",
            )
        parts.append(text)
    return "".join(parts)


def _format(fields: Respond) -> Format | None:
    said = dict((fields.text.format if fields.text else None) or {})
    if not said or said.get("type") == "text":
        return None
    if said.get("type") == "json_schema":
        said = {"type": "json_schema", "json_schema": {key: value for key, value in said.items() if key != "type"}}
    try:
        return Format.model_validate(said)
    except ValidationError as error:
        raise Problem(400, f"text.format: {error.errors()[0]['msg']}", "text.format") from error


def _base(fields: Respond, model: str, sampling: Any) -> dict[str, Any]:
    told = fields.model_dump(exclude_none=True)
    tools = [tool for tool in told.get("tools", ()) if tool["type"] != "web_search"]
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": fields.instructions,
        "max_output_tokens": fields.max_output_tokens,
        "max_tool_calls": None,
        "model": model,
        "output": [],
        "parallel_tool_calls": fields.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt_cache_key": fields.prompt_cache_key,
        "safety_identifier": fields.safety_identifier,
        "reasoning": {"effort": None, "summary": None} | told.get("reasoning", {}),
        "service_tier": "default",
        "store": False,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "top_logprobs": fields.top_logprobs or 0,
        "text": {"format": {"type": "text"}} | told.get("text", {}),
        "tool_choice": told.get("tool_choice", "auto"),
        "tools": [{"description": None, "parameters": None, "strict": None} | tool for tool in tools],
        "truncation": "disabled",
        "usage": None,
        "user": fields.user,
        "metadata": fields.metadata or {},
    }


@dataclass(frozen=True)
class Form:
    """Where a text stands in its item, and what its events are called."""

    place: str  # the list in the item
    index: str
    type: str
    part: str
    text: str


FORMS = {
    "answer": Form("content", "content_index", "output_text", "response.content_part", "response.output_text"),
    "think": Form("content", "content_index", "reasoning_text", "response.content_part", "response.reasoning_text"),
    "summary": Form(
        "summary",
        "summary_index",
        "summary_text",
        "response.reasoning_summary_part",
        "response.reasoning_summary_text",
    ),
}


class Writer:
    """The events of one answer, numbered; the items they build are what the whole answer holds.

    `summary`: the client shows summaries of reasoning. There are none, so the reasoning itself stands in their place.
    """

    def __init__(
        self,
        base: dict[str, Any],
        turn: Turn,
        tokens: Tokens | None,
        asked: int,
        summary: bool,
        spaces: dict[str, tuple[str, str]],
    ):
        self.base, self.turn, self.tokens, self.asked, self.spaces = base, turn, tokens, asked, spaces
        self.forms = FORMS | ({"think": FORMS["summary"]} if summary else {})
        self.number = -1
        self.items: list[dict[str, Any]] = []
        self.open = ""  # kind of the item that is being written: answer or think
        self.text = ""
        self.logprobs: list[Any] = []

    def event(self, kind: str, **more: Any) -> tuple[str, dict[str, Any]]:
        self.number += 1
        return kind, {"type": kind, "sequence_number": self.number, **more}

    def state(self, kind: str) -> tuple[str, dict[str, Any]]:
        return self.event(kind, response={**self.base, "output": list(self.items)})

    def place(self, form: Form) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, form.index: 0}

    def part(self, form: Form) -> dict[str, Any]:
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

    def say(self, told: Said) -> list[tuple[str, dict[str, Any]]]:
        out = []
        if self.open != told.kind:
            out = self.close() + self._begin(told.kind)
        self.text += told.text
        form, more = self.forms[told.kind], {}
        if told.kind == "answer":
            more = {"logprobs": self.tokens.content(told.choices)["content"] if self.tokens else []}
            self.logprobs += more["logprobs"]
        return [*out, self.event(f"{form.text}.delta", **self.place(form), delta=told.text, **more)]

    def call(self, told: Called) -> list[tuple[str, dict[str, Any]]]:
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

    def end(self, told: Ended) -> list[tuple[str, dict[str, Any]]]:
        sending.check_end(told.finished)
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
                "output_tokens_details": {"reasoning_tokens": told.thought},
                "total_tokens": self.asked + usage.answer,
            },
        }
        return [*out, self.state("response.incomplete" if cut else "response.completed")]

    def hear(self, event: Any) -> list[tuple[str, dict[str, Any]]]:
        out: list[tuple[str, dict[str, Any]]] = []
        for told in self.turn.hear(event):
            out += (
                self.say(told)
                if isinstance(told, Said)
                else self.call(told)
                if isinstance(told, Called)
                else self.end(told)
            )
        return out


async def _whole(chorus: Chorus, writer: Writer) -> dict[str, Any]:
    async for _, event in chorus:
        writer.hear(event)
    return {**writer.base, "output": writer.items}


async def _stream(chorus: Chorus, writer: Writer) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    yield writer.state("response.created")
    yield writer.state("response.in_progress")
    try:
        async for _, event in chorus:
            for told in writer.hear(event):
                yield told
    except Problem as problem:
        writer.base |= {"status": "failed", "error": {"code": "server_error", "message": problem.message}}
        yield writer.state("response.failed")
