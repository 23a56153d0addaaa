"""The clients of soak.py: the actions that they run one after another, and the errors that they find in answers."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
from soak_protocols import CHAT, MODEL, PROTOCOLS, Protocol

VOCABULARY, CONTEXT = 2048, 2048  # of the demo model
QUESTIONS = (
    "What is a rule file?",
    "What is ktx?",
    "Which flags does the chat have?",
    "Who are you?",
    "Tell me a joke.",
)
FIXED = [(protocol, text, seed) for protocol in PROTOCOLS for seed, text in enumerate(QUESTIONS)]
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["rule", "flag", "weight"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["kind", "count"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look_up", "description": "Looks up.", "parameters": SCHEMA}}
PATTERN = "(rule|flag)-[0-9]{3}"


@dataclass
class Tally:
    """Counts and errors of all clients."""

    done: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    chunks: int = 0
    firsts: list[float] = field(default_factory=list)  # TTFT in seconds of short questions
    fixed: dict[int, str] = field(default_factory=dict)  # the first answer to each of FIXED
    wrong: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        """Number of actions done."""
        return self.done.total()

    def expect(self, good: bool, what: str) -> None:
        """Records the error `what` unless `good`."""
        if not good:
            self.wrong.append(what[:300])


@dataclass
class Client:
    """A client with its own connection pool and random generator."""

    http: httpx.AsyncClient
    rng: random.Random
    tally: Tally

    async def work(self, until: Callable[[], bool]) -> None:
        """Runs random actions until `until` returns True; errors of the server are recorded and do not end it."""
        names, weights = list(ACTIONS), [weight for weight, _ in ACTIONS.values()]
        while not until():
            (name,) = self.rng.choices(names, weights)
            try:
                await ACTIONS[name][1](self)
            except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
                self.tally.expect(False, f"{name}: {type(error).__name__}: {error}")
            self.tally.done[name] += 1

    async def post(self, path: str, body: Any, expected: tuple[int, ...] = (200,)) -> Any:
        """Sends a request, checks its status and returns the JSON of the response."""
        raw = {"content": body} if isinstance(body, bytes) else {"json": body}
        response = await self.http.post(path, **raw)
        self.check_status(path, response.status_code, expected, response.text)
        return response.json()

    def check_status(self, path: str, status: int, expected: tuple[int, ...], text: str = "") -> None:
        """Records a status and checks it against the expected ones."""
        self.tally.statuses[status] += 1
        self.tally.expect(status in expected, f"{path}: status {status}, expected {expected}: {text}")

    async def stream(self, protocol: Protocol, body: dict[str, Any], max_chunks: int = 1 << 30) -> tuple[str, float]:
        """Reads a stream; returns its text and the seconds to the first text.

        After `max_chunks` chunks of text it disconnects.
        """
        start_s, ttft_s, text, count = time.monotonic(), 0.0, "", 0
        async with self.http.stream("POST", protocol.path, json=body) as response:
            self.check_status(protocol.path, response.status_code, (200,))
            async for line in response.aiter_lines():
                for event in protocol.events(line):
                    self.tally.expect("error" not in event or event["error"] is None, f"{protocol.path}: {line}")
                    chunk = protocol.event_text(event)
                    ttft_s = ttft_s or (time.monotonic() - start_s if chunk else 0.0)
                    text, count = text + chunk, count + bool(chunk)
                if count >= max_chunks:
                    break
        self.tally.chunks += count
        return text, ttft_s

    # ---- actions

    async def fixed(self) -> None:
        """Repeats a question and seed: the answer must be the same, complete or streamed."""
        index = self.rng.randrange(len(FIXED))
        protocol, text, seed = FIXED[index]
        stream = self.rng.random() < 0.5
        body = protocol.body(text, 24, seed, stream)
        answer = (
            (await self.stream(protocol, body))[0]
            if stream
            else protocol.answer_text(await self.post(protocol.path, body))
        )
        first_answer = self.tally.fixed.setdefault(index, answer)
        self.tally.expect(
            answer == first_answer and bool(answer),
            f"{protocol.path}, {text!r}: answered {first_answer!r}, then {answer!r}",
        )

    async def short(self) -> None:
        """Asks a short question and records its TTFT."""
        text = f"{self.rng.choice(QUESTIONS)} ({self.rng.randrange(1 << 30)})"
        _, ttft_s = await self.stream(CHAT, CHAT.body(text, self.rng.randint(1, 40), self.rng.randrange(99), True))
        if ttft_s:
            self.tally.firsts.append(ttft_s)

    async def leave(self) -> None:
        """Disconnects early: from a stream after some chunks, from a complete answer after some time."""
        protocol = self.rng.choice(PROTOCOLS)
        body = protocol.body(f"Tell me all. {self.rng.random()}", 300, 1, self.rng.random() < 0.7)
        if body["stream"]:
            await self.stream(protocol, body, self.rng.randint(1, 12))
            return
        try:
            await asyncio.wait_for(self.http.post(protocol.path, json=body), self.rng.uniform(0.01, 0.5))
        except TimeoutError:
            return

    async def bad(self) -> None:
        """Sends a request that must be refused."""
        path, body, status = self.rng.choice(BAD)
        await self.post(path, body, (status,))

    async def long(self) -> None:
        """Sends a prompt that fills most of the context, and at least half of the KV cache."""
        prompt_tokens = self.rng.randint(1000, 1600)
        ids = [self.rng.randrange(16, VOCABULARY) for _ in range(prompt_tokens)]
        max_tokens = self.rng.randint(32, 256)
        body = {"model": MODEL, "prompt": ids, "max_tokens": max_tokens, "ignore_eos": True}
        usage = (await self.post("/v1/completions", body))["usage"]
        reported = (usage["prompt_tokens"], usage["completion_tokens"])
        self.tally.expect(
            reported == (prompt_tokens, max_tokens),
            f"a prompt of {prompt_tokens} and an answer of {max_tokens} tokens: usage {usage}",
        )

    async def grammar(self) -> None:
        """Requests structured output by a schema or a regular expression."""
        body = CHAT.body(f"Count. {self.rng.random()}", 60, self.rng.randrange(99), False)
        if self.rng.random() < 0.5:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
        else:
            body["guided_regex"] = PATTERN
        (choice,) = (await self.post(CHAT.path, body))["choices"]
        text = choice["message"]["content"]
        if choice["finish_reason"] == "stop":
            is_valid = fits_schema(text) if "response_format" in body else bool(re.fullmatch(PATTERN, text))
            self.tally.expect(is_valid, f"the output {text!r} violates its grammar")

    async def call(self) -> None:
        """Requests a forced tool call."""
        body = CHAT.body(f"Look up. {self.rng.random()}", 120, self.rng.randrange(99), False)
        tool_choice = self.rng.choice(["required", {"type": "function", "function": {"name": "look_up"}}])
        (choice,) = (await self.post(CHAT.path, body | {"tools": [TOOL], "tool_choice": tool_choice}))["choices"]
        calls = choice["message"].get("tool_calls") or []
        if choice["finish_reason"] != "length":
            is_valid = bool(calls) and all(fits_schema(one["function"]["arguments"]) for one in calls)
            self.tally.expect(is_valid, f"a forced tool call returned {choice}")

    async def follow(self) -> None:
        """Continues a stored conversation by `previous_response_id`, then reads its last response and may delete it."""
        body, previous_tokens, previous_id = {"model": MODEL, "max_output_tokens": 16}, 0, None
        for _ in range(self.rng.randint(2, 4)):
            turn = {"input": f"Tell me more. {self.rng.random()}", "previous_response_id": previous_id}
            response = await self.post("/v1/responses", body | turn)
            tokens = response["usage"]["input_tokens"]
            self.tally.expect(
                tokens > previous_tokens, f"/v1/responses: {tokens} input tokens after a turn with {previous_tokens}"
            )
            previous_id, previous_tokens = response["id"], tokens
        stored = await self.http.get(f"/v1/responses/{previous_id}")
        self.check_status("/v1/responses/ID", stored.status_code, (200,), stored.text)
        self.tally.expect(stored.json() == response, f"/v1/responses/{previous_id}: stored {stored.text[:200]}")
        if self.rng.random() < 0.5:
            deleted = await self.http.delete(f"/v1/responses/{previous_id}")
            self.check_status("/v1/responses/ID", deleted.status_code, (200,), deleted.text)
            missing = await self.http.get(f"/v1/responses/{previous_id}")
            self.check_status("/v1/responses/ID", missing.status_code, (404,), missing.text)

    async def look(self) -> None:
        """Requests metrics, models and tokenization."""
        response = await self.http.get(
            self.rng.choice(["/metrics", "/v1/models", "/health", "/tokenizer_info", "/api/tags"])
        )
        self.check_status(str(response.url), response.status_code, (200,), response.text)
        tokenized = await self.post("/tokenize", {"prompt": "a rule file"})
        detokenized = await self.post("/detokenize", {"tokens": tokenized["tokens"]})
        self.tally.expect(detokenized["prompt"].endswith("a rule file"), f"/detokenize: {detokenized}")


def fits_schema(text: str) -> bool:
    """Returns whether a text is JSON that conforms to SCHEMA."""
    value = json.loads(text)
    return set(value) == {"kind", "count"} and value["kind"] in ("rule", "flag", "weight") and 0 <= value["count"] <= 99


ACTIONS: dict[str, tuple[int, Callable[[Client], Awaitable[None]]]] = {  # relative frequency and method
    "fixed": (30, Client.fixed),
    "short": (20, Client.short),
    "leave": (14, Client.leave),
    "bad": (10, Client.bad),
    "long": (6, Client.long),
    "grammar": (8, Client.grammar),
    "call": (6, Client.call),
    "follow": (4, Client.follow),
    "look": (6, Client.look),
}
_CHAT_BODY = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
BAD: tuple[tuple[str, Any, int], ...] = (
    ("/v1/chat/completions", b"{", 400),
    ("/v1/chat/completions", b'{"model": "\xff"}', 400),
    ("/v1/chat/completions", _CHAT_BODY | {"temperature": "hot"}, 400),
    ("/v1/chat/completions", _CHAT_BODY | {"tempurature": 1}, 400),
    ("/v1/chat/completions", _CHAT_BODY | {"model": "gpt-9"}, 404),
    ("/v1/chat/completions", _CHAT_BODY | {"max_tokens": 100_000}, 400),
    ("/v1/chat/completions", _CHAT_BODY | {"guided_regex": "("}, 400),
    ("/v1/chat/completions", {**_CHAT_BODY, "messages": [{"role": "user", "content": "x" * 100_000}]}, 400),
    ("/v1/completions", {"model": MODEL, "prompt": [VOCABULARY + 7]}, 400),
    ("/v1/messages", {"model": MODEL, "messages": []}, 400),
    ("/v1/embeddings", {"model": MODEL, "input": "x"}, 501),
    ("/api/chat", {"model": "nobody", "messages": []}, 404),
    ("/v1/nothing", {}, 404),
)
