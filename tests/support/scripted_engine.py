"""An engine without a model: it outputs what a script defines, at a given pace. For tests of everything around a
model.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ktx.cli.serve import make_engine_options
from ktx.engine.engine import Engine, Options
from ktx.engine.request import Request
from ktx.engine.runner import Logits, ModelRunner, num_logits
from ktx.engine.scheduler import ScheduledChunk, num_pages
from ktx.errors import BadFile
from ktx.loader.meta_model import read_tokenizer
from ktx.model.lora import Adapters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


ECHO_TOKENS = 64  # last prompt tokens that a request outputs where the script has no entry for it
Script = Callable[[Sequence[int]], Sequence[int]]  # a prompt's ids -> the output's ids


class ScriptedModel(nn.Module):
    """What an engine and a server read of a model; it has no weights."""

    generation_config = None

    def __init__(self, vocabulary: int, end: int, context: int):
        super().__init__()
        self.config = SimpleNamespace(
            vocab_size=vocabulary, max_position_embeddings=context, model_type="scripted", eos_token_id=end
        )
        self.ktx = SimpleNamespace(notes=[], nbytes=0)

    def get_output_embeddings(self) -> None:
        return None


class ScriptedRunner(ModelRunner):
    """A forward takes `seconds` for each token; the most probable token is the script's next one, then the end
    token.
    """

    def __init__(self, script: Script, vocabulary: int, end: int, pages: int, seconds: float = 0.0):
        self.script, self.vocabulary, self.end, self.pages, self.seconds = script, vocabulary, end, pages, seconds
        self.answers: dict[int, list[int]] = {}
        self.adapters = Adapters()
        self.last_progress = time.monotonic()

    def run(self, chunks: Sequence[ScheduledChunk]) -> Logits:
        """Waits `seconds` per token and returns the script's logits."""
        for _ in range(sum(chunk.count for chunk in chunks)):
            self._on_layer(chunks)
            time.sleep(self.seconds)
        return {chunk.request: self._make_logits(chunk) for chunk in chunks}

    def largest_step(self, max_tokens: int, memory_share: float = 1.0) -> int:
        """Returns `max_tokens`: no memory is needed."""
        return max_tokens

    def _make_logits(self, chunk: ScheduledChunk) -> torch.Tensor:
        """Returns logits [rows, vocabulary] that make the script's next token the most probable one in each row."""
        rows, request = num_logits(chunk), chunk.request
        logits = torch.zeros(rows, self.vocabulary, dtype=torch.float32)
        for row, position in zip(
            logits, range(chunk.start + chunk.count - rows, chunk.start + chunk.count), strict=True
        ):
            row[self._next_token(request, position + 1)] = 30.0
        return logits

    def _next_token(self, request: Request, position: int) -> int:
        """Returns the token at a position: of the prompt, of the script's output, or the end token after it."""
        if position < len(request.prompt):
            return request.prompt[position]
        if request.id not in self.answers:
            self.answers[request.id] = list(self.script(request.prompt))
        output = self.answers[request.id]
        index = position - len(request.prompt)
        return output[index] if index < len(output) else self.end

    def free(self, request: Request) -> None:
        """Frees the request's output."""
        self.answers.pop(request.id, None)

    def clear(self) -> None:
        """Frees all outputs."""
        self.answers.clear()

    def nbytes(self) -> int:
        """Returns 0: there is no KV cache."""
        return 0


def read_script(path: str | Path | None, tokenizer: PreTrainedTokenizerBase) -> Script:
    """Reads a script.

    Args:
        path: a JSON file: a list of {"match": part of the prompt, "text": output} (or "ids"). The first entry that
            matches a prompt is used; where none matches, or without a file, the end of the prompt is the output.
        tokenizer: encodes the texts.

    Raises:
        BadFile: the file is not a script.
    """
    entries: list[tuple[str, list[int]]] = []
    if path is not None:
        try:
            for entry in json.loads(Path(path).read_text(encoding="utf-8")):
                output_ids = (
                    entry["ids"] if "ids" in entry else tokenizer(entry["text"], add_special_tokens=False)["input_ids"]
                )
                entries.append((str(entry.get("match", "")), [int(token) for token in output_ids]))
        except OSError as error:
            raise BadFile(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadFile(f'{path}: is not a script, a JSON list of {{"match": ..., "text": ...}}: {error}') from error

    def script(prompt: Sequence[int]) -> Sequence[int]:
        """Returns the output of the first entry that matches the prompt."""
        text = tokenizer.decode(list(prompt), skip_special_tokens=False)
        found = next((output_ids for match, output_ids in entries if match in text), None)
        return prompt[-ECHO_TOKENS:] if found is None else found

    return script


def scripted_engine(
    tokenizer: PreTrainedTokenizerBase, options: Options, script: Script, seconds: float = 0.0, context: int = 1 << 15
) -> Engine:
    """Returns an engine whose outputs follow a script."""
    vocabulary, end = len(tokenizer), tokenizer.eos_token_id
    model = ScriptedModel(vocabulary, end, context)
    runner = ScriptedRunner(script, vocabulary, end, num_pages(options.kv_cache_tokens), seconds)
    return Engine(model, tokenizer, options, runner)


def make_engine(args: argparse.Namespace, state: Any) -> Engine:
    """Returns the engine of tests.support.scripted_server, with the tokenizer of --model."""
    tokenizer = read_tokenizer(args.model, None)
    return scripted_engine(
        tokenizer, Options(**make_engine_options(args)), read_script(args.script, tokenizer), args.pace
    )
