"""What the clients of soak.py do, one thing after another, and what they find wrong with the answers."""

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
    """What all clients have done and seen."""

    done: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    pieces: int = 0
    firsts: list[float] = field(default_factory=list)  # seconds to the first text of short questions
    fixed: dict[int, str] = field(default_factory=dict)  # the first answer to each of FIXED
    wrong: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return self.done.total()

    def expect(self, good: bool, what: str) -> None:
        if not good:
            self.wrong.append(what[:300])


@dataclass
class Client:
    """One client with a connection pool and chances of its own."""

    http: httpx.AsyncClient
    chance: random.Random
    tally: Tally

    async def work(self, until: Callable[[], bool]) -> None:
        """Does one thing after another. What the server does wrong is counted and never ends a client."""
        names, weights = list(ACTIONS), [weight for weight, _ in ACTIONS.values()]
        while not until():
            (name,) = self.chance.choices(names, weights)
            try:
                await ACTIONS[name][1](self)
            except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
                self.tally.expect(False, f"{name}: {type(error).__name__}: {error}")
            self.tally.done[name] += 1

    async def post(self, path: str, body: Any, wanted: tuple[int, ...] = (200,)) -> Any:
        """An answer's JSON."""
        raw = {"content": body} if isinstance(body, bytes) else {"json": body}
        answer = await self.http.post(path, **raw)
        self.seen(path, answer.status_code, wanted, answer.text)
        return answer.json()

    def seen(self, path: str, status: int, wanted: tuple[int, ...], text: str = "") -> None:
        self.tally.statuses[status] += 1
        self.tally.expect(status in wanted, f"{path}: status {status}, expected {wanted}: {text}")

    async def stream(self, protocol: Protocol, body: dict[str, Any], most: int = 1 << 30) -> tuple[str, float]:
        """The text of a stream, of which at most so many pieces are waited for, and the seconds to the first one."""
        start, first, text, count = time.monotonic(), 0.0, "", 0
        async with self.http.stream("POST", protocol.path, json=body) as answer:
            self.seen(protocol.path, answer.status_code, (200,))
            async for line in answer.aiter_lines():
                for event in protocol.events(line):
                    self.tally.expect("error" not in event or event["error"] is None, f"{protocol.path}: {line}")
                    piece = protocol.piece(event)
                    first = first or (time.monotonic() - start if piece else 0.0)
                    text, count = text + piece, count + bool(piece)
                if count >= most:
                    break
        self.tally.pieces += count
        return text, first

    # ---- what there is to do

    async def fixed(self) -> None:
        """The same question and seed as before: the same answer, whole or in pieces."""
        number = self.chance.randrange(len(FIXED))
        protocol, text, seed = FIXED[number]
        stream = self.chance.random() < 0.5
        body = protocol.body(text, 24, seed, stream)
        said = (
            (await self.stream(protocol, body))[0] if stream else protocol.whole(await self.post(protocol.path, body))
        )
        before = self.tally.fixed.setdefault(number, said)
        self.tally.expect(said == before and bool(said), f"{protocol.path}, {text!r}: said {before!r}, then {said!r}")

    async def short(self) -> None:
        """A short question, whose first token should come soon."""
        text = f"{self.chance.choice(QUESTIONS)} ({self.chance.randrange(1 << 30)})"
        _, first = await self.stream(CHAT, CHAT.body(text, self.chance.randint(1, 40), self.chance.randrange(99), True))
        if first:
            self.tally.firsts.append(first)

    async def leave(self) -> None:
        """Goes away in the middle: of a stream after some pieces, of a whole answer after some time."""
        protocol = self.chance.choice(PROTOCOLS)
        body = protocol.body(f"Tell me all. {self.chance.random()}", 300, 1, self.chance.random() < 0.7)
        if body["stream"]:
            await self.stream(protocol, body, self.chance.randint(1, 12))
            return
        try:
            await asyncio.wait_for(self.http.post(protocol.path, json=body), self.chance.uniform(0.01, 0.5))
        except TimeoutError:
            return

    async def bad(self) -> None:
        """What is refused."""
        path, body, status = self.chance.choice(BAD)
        await self.post(path, body, (status,))

    async def long(self) -> None:
        """A prompt that fills most of the context, and of the cache half or more."""
        count = self.chance.randint(1000, 1600)
        ids = [self.chance.randrange(16, VOCABULARY) for _ in range(count)]
        limit = self.chance.randint(32, 256)
        body = {"model": MODEL, "prompt": ids, "max_tokens": limit, "ignore_eos": True}
        usage = (await self.post("/v1/completions", body))["usage"]
        told = (usage["prompt_tokens"], usage["completion_tokens"])
        self.tally.expect(told == (count, limit), f"a prompt of {count} and an answer of {limit} tokens: usage {usage}")

    async def grammar(self) -> None:
        """Answers that follow a schema or an expression."""
        body = CHAT.body(f"Count. {self.chance.random()}", 60, self.chance.randrange(99), False)
        if self.chance.random() < 0.5:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
        else:
            body["guided_regex"] = PATTERN
        (choice,) = (await self.post(CHAT.path, body))["choices"]
        said = choice["message"]["content"]
        if choice["finish_reason"] == "stop":
            fits = fits_schema(said) if "response_format" in body else bool(re.fullmatch(PATTERN, said))
            self.tally.expect(fits, f"a grammar let {said!r} pass")

    async def call(self) -> None:
        """A call of a function that is asked for."""
        body = CHAT.body(f"Look up. {self.chance.random()}", 120, self.chance.randrange(99), False)
        choice = self.chance.choice(["required", {"type": "function", "function": {"name": "look_up"}}])
        (made,) = (await self.post(CHAT.path, body | {"tools": [TOOL], "tool_choice": choice}))["choices"]
        calls = made["message"].get("tool_calls") or []
        if made["finish_reason"] != "length":
            good = bool(calls) and all(fits_schema(one["function"]["arguments"]) for one in calls)
            self.tally.expect(good, f"a forced call came out as {made}")

    async def follow(self) -> None:
        """A conversation that the server keeps: each answer goes on with the one before it, and is forgotten when that is asked for."""
        body, asked, before = {"model": MODEL, "max_output_tokens": 16}, 0, None
        for _ in range(self.chance.randint(2, 4)):
            said = {"input": f"Tell me more. {self.chance.random()}", "previous_response_id": before}
            made = await self.post("/v1/responses", body | said)
            tokens = made["usage"]["input_tokens"]
            self.tally.expect(tokens > asked, f"/v1/responses: {tokens} tokens where {asked} came before")
            before, asked = made["id"], tokens
        kept = await self.http.get(f"/v1/responses/{before}")
        self.seen("/v1/responses/ID", kept.status_code, (200,), kept.text)
        self.tally.expect(kept.json() == made, f"/v1/responses/{before}: kept {kept.text[:200]}")
        if self.chance.random() < 0.5:
            gone = await self.http.delete(f"/v1/responses/{before}")
            self.seen("/v1/responses/ID", gone.status_code, (200,), gone.text)
            again = await self.http.get(f"/v1/responses/{before}")
            self.seen("/v1/responses/ID", again.status_code, (404,), again.text)

    async def look(self) -> None:
        """What boards and tokenizers ask for."""
        answer = await self.http.get(
            self.chance.choice(["/metrics", "/v1/models", "/health", "/tokenizer_info", "/api/tags"])
        )
        self.seen(str(answer.url), answer.status_code, (200,), answer.text)
        told = await self.post("/tokenize", {"prompt": "a rule file"})
        back = await self.post("/detokenize", {"tokens": told["tokens"]})
        self.tally.expect(back["prompt"].endswith("a rule file"), f"/detokenize: {back}")


def fits_schema(text: str) -> bool:
    """Whether a text is what SCHEMA allows."""
    value = json.loads(text)
    return set(value) == {"kind", "count"} and value["kind"] in ("rule", "flag", "weight") and 0 <= value["count"] <= 99


ACTIONS: dict[str, tuple[int, Callable[[Client], Awaitable[None]]]] = {  # how often, what
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
_ASK = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
BAD: tuple[tuple[str, Any, int], ...] = (
    ("/v1/chat/completions", b"{", 400),
    ("/v1/chat/completions", b'{"model": "\xff"}', 400),
    ("/v1/chat/completions", _ASK | {"temperature": "hot"}, 400),
    ("/v1/chat/completions", _ASK | {"tempurature": 1}, 400),
    ("/v1/chat/completions", _ASK | {"model": "gpt-9"}, 404),
    ("/v1/chat/completions", _ASK | {"max_tokens": 100_000}, 400),
    ("/v1/chat/completions", _ASK | {"guided_regex": "("}, 400),
    ("/v1/chat/completions", {**_ASK, "messages": [{"role": "user", "content": "x" * 100_000}]}, 400),
    ("/v1/completions", {"model": MODEL, "prompt": [VOCABULARY + 7]}, 400),
    ("/v1/messages", {"model": MODEL, "messages": []}, 400),
    ("/v1/embeddings", {"model": MODEL, "input": "x"}, 501),
    ("/api/chat", {"model": "nobody", "messages": []}, 404),
    ("/v1/nothing", {}, 404),
)
