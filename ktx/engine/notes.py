"""The engine's notes on its model: how requests are computed, and how long they can be."""

from __future__ import annotations

from typing import Protocol

from ktx.model.notes import Note


class Runner(Protocol):
    """What the notes read of a runner, see ktx.engine.runner."""

    sequential_reason: str
    unsupported_reason: str


ENGINES = ("serial", "context")  # codes of the engine's notes


def engine_notes(runner: Runner, prefix_cache: bool, context: int, limit: int) -> list[Note]:
    """Returns the notes on what makes an engine slower or its requests shorter than a user may expect.

    Args:
        runner: computes the engine's forwards.
        prefix_cache: whether the engine's options enable the prefix cache.
        context: maximum tokens of a request.
        limit: the model's maximum context in tokens.
    """
    notes = []
    if runner.sequential_reason:
        no_prefix_cache = ", without a prefix cache" if prefix_cache else ""
        notes.append(
            Note("serial", f"requests are computed one after another{no_prefix_cache}: {runner.sequential_reason}")
        )
    if runner.unsupported_reason:
        notes.append(Note("flag", f"no CUDA graphs, kernels are launched one by one: {runner.unsupported_reason}"))
    if context < limit:
        notes.append(
            Note(
                "context",
                f"a request holds at most {context} of the model's {limit} tokens: "
                "--kv-cache-tokens and --max-context raise it",
            )
        )
    return notes
