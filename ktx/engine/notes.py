"""The engine's notes on its model: how requests are computed, and how long they can be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ktx.model.notes import Note

if TYPE_CHECKING:
    from ktx.engine.engine import Engine


ENGINES = ("serial", "context")  # codes of the engine's notes


def engine_notes(engine: Engine, limit: int) -> list[Note]:
    """Returns an engine's notes. `limit`: the model's maximum context in tokens."""
    notes, runner = [], engine.runner
    if runner.sequential_reason:
        no_prefix_cache = ", without a prefix cache" if engine.options.prefix_cache else ""
        notes.append(
            Note("serial", f"requests are computed one after another{no_prefix_cache}: {runner.sequential_reason}")
        )
    if runner.unsupported_reason:
        notes.append(Note("flag", f"no CUDA graphs, kernels are launched one by one: {runner.unsupported_reason}"))
    if engine.context < limit:
        notes.append(
            Note(
                "context",
                f"a request holds at most {engine.context} of the model's {limit} tokens: "
                "--cache-lens and --max-context raise it",
            )
        )
    return notes
