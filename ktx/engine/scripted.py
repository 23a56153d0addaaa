"""An engine without a model: it says what a script tells it to, at a given pace. For tests of everything around a model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ktx.engine.engine import Engine, Options
from ktx.engine.request import Request
from ktx.engine.runner import Logits, ModelRunner, num_logits
from ktx.engine.scheduler import ScheduledChunk, pages_for
from ktx.errors import BadFile
from ktx.model.lora import Adapters

ECHO = 64  # tokens of its prompt that a request hears when the script has nothing for it
Script = Callable[[Sequence[int]], Sequence[int]]  # a prompt's ids -> the answer's


class ScriptedRunner(ModelRunner):
    """A forward takes `seconds` for each token it computes; the likeliest token is the next one of the script, then the end."""

    def __init__(self, script: Script, vocabulary: int, end: int, pages: int, seconds: float = 0.0):
        self.script, self.vocabulary, self.end, self.pages, self.seconds = script, vocabulary, end, pages, seconds
        self.answers: dict[int, list[int]] = {}
        self.adapters = Adapters()
        self.last_progress = time.monotonic()

    def run(self, parts: Sequence[ScheduledChunk]) -> Logits:
        for _ in range(sum(part.count for part in parts)):
            self._look(parts)
            time.sleep(self.seconds)
        return {part.request: self._logits(part) for part in parts}

    def largest_step(self, most: int, share: float = 1.0) -> int:
        return most

    def _logits(self, part: ScheduledChunk) -> torch.Tensor:
        rows, request = num_logits(part), part.request
        logits = torch.zeros(rows, self.vocabulary, dtype=torch.float32)
        for row, at in zip(logits, range(part.start + part.count - rows, part.start + part.count), strict=True):
            row[self._next(request, at + 1)] = 30.0
        return logits

    def _next(self, request: Request, position: int) -> int:
        if position < len(request.prompt):
            return request.prompt[position]
        if request.id not in self.answers:
            self.answers[request.id] = list(self.script(request.prompt))
        said = self.answers[request.id]
        place = position - len(request.prompt)
        return said[place] if place < len(said) else self.end

    def forget(self, request: Request) -> None:
        self.answers.pop(request.id, None)

    def clear(self) -> None:
        self.answers.clear()

    def nbytes(self) -> int:
        return 0


def read_script(path: str | Path | None, tokenizer: Any) -> Script:
    """A script from a JSON file: a list of {"match": part of the prompt, "text": answer} (or "ids"), of which the first that matches
    counts; without a file, and where nothing matches, the end of the prompt itself. BadFile when it is none.
    """
    entries: list[tuple[str, list[int]]] = []
    if path is not None:
        try:
            for entry in json.loads(Path(path).read_text(encoding="utf-8")):
                said = (
                    entry["ids"] if "ids" in entry else tokenizer(entry["text"], add_special_tokens=False)["input_ids"]
                )
                entries.append((str(entry.get("match", "")), [int(token) for token in said]))
        except OSError as error:
            raise BadFile(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadFile(f'{path}: is no script, a JSON list of {{"match": ..., "text": ...}}: {error}') from error

    def script(prompt: Sequence[int]) -> Sequence[int]:
        text = tokenizer.decode(prompt, skip_special_tokens=False)
        found = next((said for match, said in entries if match in text), None)
        return prompt[-ECHO:] if found is None else found

    return script


def scripted_engine(
    tokenizer: Any, options: Options, script: Script, seconds: float = 0.0, context: int = 1 << 15
) -> Engine:
    """An engine that answers by a script."""
    vocabulary, end = len(tokenizer), tokenizer.eos_token_id
    config = SimpleNamespace(
        vocab_size=vocabulary, max_position_embeddings=context, model_type="scripted", eos_token_id=end
    )
    model = SimpleNamespace(config=config, generation_config=None)
    runner = ScriptedRunner(script, vocabulary, end, pages_for(options.cache_lens), seconds)
    return Engine(model, tokenizer, options, runner)
