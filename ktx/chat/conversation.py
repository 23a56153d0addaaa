"""The state of a chat between turns: messages, sampling parameters, session. No terminal here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ktx.chat.reading import replace_surrogates
from ktx.chat_formats import Text
from ktx.engine.chat_session import Session
from ktx.engine.request import Finished
from ktx.engine.sampler import SamplingParams
from ktx.errors import BadFile, UsageError, did_you_mean

ROLES = ("system", "user", "assistant")
CHAT_PARAMETERS = [
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "max_new_tokens",
]


@dataclass
class Conversation:
    """The messages of one chat. `send` submits a message and stores the model's output, also one that was cancelled."""

    session: Session
    sampling: SamplingParams
    system: str = ""
    force_think: bool = False
    turns: list[dict[str, str]] = field(default_factory=list)
    last: Finished | None = None

    def __post_init__(self) -> None:
        self.system = replace_surrogates(self.system)

    def messages(self) -> list[dict[str, str]]:
        """Returns the system message and the turns."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def send(self, text: str) -> Iterator[Text | Finished]:
        """Submits a new message and yields the output's events. The message is not stored when the prompt is
        refused.
        """
        self.turns.append({"role": "user", "content": replace_surrogates(text)})
        try:
            prompt = self.session.render(self.messages(), self.force_think)
            output = ""
            for event in self.session.stream(prompt, self.sampling):
                if isinstance(event, Finished):
                    self.last = event
                elif event.kind == "answer":  # reasoning is not stored
                    output += event.text
                yield event
        except UsageError:
            self.turns.pop()
            raise
        self.turns.append({"role": "assistant", "content": output})

    def clear(self) -> None:
        """Removes all turns and empties the engine's prefix cache."""
        self.turns, self.last = [], None
        self.session.reset()

    def undo(self) -> str | None:
        """Removes the last question and its answer and returns the question; None if there is none."""
        while self.turns:
            turn = self.turns.pop()
            if turn["role"] == "user":
                return turn["content"]
        return None

    def set(self, name: str, value: str) -> str:
        """Sets one sampling parameter, for /set, and returns a confirmation. UsageError for an unknown name or a value
        out of range.
        """
        name = name.replace("-", "_")
        if name not in CHAT_PARAMETERS:
            raise UsageError(
                f"unknown sampling parameter {name!r}{did_you_mean(name, CHAT_PARAMETERS)}; "
                f"there are: {' '.join(CHAT_PARAMETERS)}"
            )
        convert = int if name in ("top_k", "seed", "max_new_tokens") else float
        try:
            new: Any = None if name == "seed" and value.lower() in ("none", "off") else convert(value)
        except ValueError:
            raise UsageError(f"{name} needs a number, found {value!r}") from None
        self.sampling = replace(self.sampling, **{name: new})
        return f"{name} = {new}"

    def save(self, path: Path) -> None:
        """Writes the conversation to a JSON file."""
        path.write_text(
            json.dumps({"system": self.system, "turns": self.turns}, ensure_ascii=False, indent=1) + "\n",
            encoding="utf-8",
        )

    def load(self, path: Path) -> int:
        """Replaces the conversation by a saved one and returns its number of messages. BadFile when the file is not a
        saved chat.
        """
        try:
            saved: Any = json.loads(path.read_text(encoding="utf-8"))
            turns, system = saved["turns"], saved.get("system", "")
            valid = isinstance(system, str) and all(
                turn["role"] in ROLES and isinstance(turn["content"], str) for turn in turns
            )
        except OSError as error:
            raise BadFile(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise BadFile(f"{path}: is not a saved chat") from error
        if not valid:
            raise BadFile(f"{path}: is not a saved chat: roles must be {', '.join(ROLES)} and contents must be text")
        self.clear()
        self.system = replace_surrogates(system)
        self.turns = [{"role": turn["role"], "content": replace_surrogates(turn["content"])} for turn in turns]
        return len(self.turns)
