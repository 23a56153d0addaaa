"""What an engine adds to the notes on its model: how requests are computed, and how long they can be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ktx.model.notes import Note

if TYPE_CHECKING:
    from ktx.engine.engine import Engine


ENGINES = ("serial", "context")  # codes of notes that are an engine's


def notes_of(engine: Engine, limit: int) -> list[Note]:
    """`limit`: tokens of the longest context that the model has."""
    found, runner = [], engine.runner
    if runner.reason:
        off = ", and none begins with what another has computed" if engine.options.prefix_cache else ""
        found.append(Note("serial", f"requests are computed one after another{off}: {runner.reason}"))
    if runner.unsupported_reason:
        found.append(Note("flag", f"no CUDA graphs, steps are launched kernel by kernel: {runner.unsupported_reason}"))
    if engine.context < limit:
        found.append(
            Note(
                "context",
                f"a request holds at most {engine.context} of the model's {limit} tokens: --cache-lens and --max-context raise it",
            )
        )
    return found
