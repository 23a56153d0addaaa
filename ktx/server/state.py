"""The model that is served: its names, its engine once it is loaded, and what requests need of both."""

from __future__ import annotations

import asyncio
import datetime
import itertools
import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ktx.engine.engine import Engine
from ktx.engine.grammar import GrammarCompiler
from ktx.engine.prompt import PromptRenderer
from ktx.engine.request import Finished
from ktx.errors import KtxError
from ktx.server.errors import APIError
from ktx.server.model_names import meant
from ktx.server.responses.store import ResponseStore

log = logging.getLogger("ktx.server")


@dataclass(frozen=True)
class ServerSettings:
    """What the command line says about answers."""

    max_new_tokens: int | None = None  # of a request that names no number; None: what the context leaves
    force_think: bool = False
    chat_template: str | None = None
    hide_input: bool = True
    sampling: Mapping[str, Any] = field(default_factory=dict)  # over the model's own defaults
    max_stored_responses: int = 1000  # answers of /v1/responses that later requests may go on from
    keepalive_s: float = 15.0  # seconds between comments of a stream that has nothing to say
    lora_dir: Path | None = None  # below which requests may have adapters loaded; None: they may not


@dataclass
class Progress:
    """Bytes of weights read so far."""

    total: int = 0
    done: int = 0
    started: float = field(default_factory=time.monotonic)

    def advance(self, nbytes: int) -> None:
        self.done += nbytes

    def to_dict(self) -> dict[str, Any]:
        """For /health: percent and seconds left, once something is known."""
        seconds = time.monotonic() - self.started
        left = round(seconds * (self.total - self.done) / self.done, 1) if self.done else None
        return {"percent": round(100 * self.done / self.total, 1) if self.total else 0.0, "eta_seconds": left}


class ServerState:
    """`engine` is None until the model is loaded, `trouble` says why it never will be."""

    def __init__(self, names: tuple[str, ...], settings: ServerSettings | None = None, adapters: tuple[str, ...] = ()):
        self.models, self.settings = names, settings or ServerSettings()
        self.adapters: dict[str, int] = {}  # names of LoRA adapters, and their numbers
        self.numbers = itertools.count()
        for name in adapters:
            self.add_adapter(name)
        self.changing = asyncio.Lock()  # of the adapters
        self.created = int(time.time())
        self.created_iso = (
            datetime.datetime.fromtimestamp(self.created, datetime.UTC).isoformat().replace("+00:00", "Z")
        )
        self.fingerprint = f"ktx_{uuid.uuid4().hex[:10]}"
        self.progress = Progress()
        self.response_store = ResponseStore(self.settings.max_stored_responses)
        self.engine: Engine | None = None
        self.bandwidth: float | None = None  # GB/s that this machine's memory was read with before the model was loaded
        self.prompts: PromptRenderer | None = None
        self.grammars: GrammarCompiler | None = None
        self.defaults: dict[str, Any] = {}
        self.load_error = ""
        self.stopping = False
        self.warnings_sent: set[str] = set()
        self.on_finished: Callable[[Finished], None] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """That requests may have as their model."""
        return (*self.models, *self.adapters)

    def add_adapter(self, name: str) -> None:
        self.adapters = {**self.adapters, name: next(self.numbers)}

    def set_engine(self, engine: Engine) -> None:
        """From now on requests are answered."""
        tokenizer, config = engine.tokenizer, engine.model.config
        prompts = PromptRenderer(tokenizer, config.model_type, self.settings.chat_template)
        self.grammars = GrammarCompiler(tokenizer, config.vocab_size, sorted(engine.stop_ids))
        self.defaults = default_sampling(engine.model) | dict(self.settings.sampling)
        engine.on_finished = self.on_finished
        self.prompts, self.engine = prompts, engine

    def load(
        self, make: Callable[[ServerState], Engine], failed: Callable[[BaseException], None] = lambda error: None
    ) -> threading.Thread:
        """Makes the engine in a thread of its own, so that /health answers meanwhile."""

        def run() -> None:
            try:
                self.set_engine(make(self))
            except BaseException as error:  # whoever asks for /health, and whoever started the server, must hear of it
                self.load_error = str(error) if isinstance(error, KtxError) else f"{type(error).__name__}: {error}"
                failed(error)

        thread = threading.Thread(target=run, name="ktx-loading", daemon=True)
        thread.start()
        return thread

    def warn_once(self, words: str) -> None:
        """A line of the log that nobody needs with every request."""
        if words not in self.warnings_sent:
            self.warnings_sent.add(words)
            log.warning("%s: %s", self.names[0], words)

    def require_ready(self) -> tuple[Engine, PromptRenderer, GrammarCompiler]:
        """Problem 503 unless requests can be answered."""
        if self.stopping:
            raise APIError(503, "the server is shutting down", retry=5)
        if self.load_error:
            raise APIError(503, f"the model could not be loaded: {self.load_error}")
        if self.engine is None or self.prompts is None or self.grammars is None:
            told = self.progress.to_dict()
            raise APIError(503, f"Loading model: {told['percent']:.0f} %", retry=max(1, int(told["eta_seconds"] or 5)))
        if self.engine.failure:
            raise APIError(503, self.engine.failure)
        return self.engine, self.prompts, self.grammars

    def resolve_model(self, name: str) -> str:
        """The name as the answer repeats it. Problem 404 for one that is not served."""
        if not meant(name, self.names):
            raise APIError(
                404,
                f"the model {name!r} does not exist; this server has {', '.join(self.names)}",
                "model",
                "model_not_found",
            )
        return name

    def adapter_of(self, name: str) -> tuple[str, ...]:
        """The LoRA adapter that a served name means; none for the model itself."""
        found = meant(name, self.adapters)
        return (found,) if found else ()

    def path_of(self, name: str) -> str:
        """Where an adapter was loaded from; of a model its name."""
        engine, _, _ = self.require_ready()
        found = engine.runner.adapters.known.get(meant(name, self.adapters))
        return found.path if found else name

    def health(self) -> tuple[int, dict[str, Any]]:
        """Status and body of /health: the engine's heartbeat."""
        if self.engine is None and not self.load_error:
            return 503, {
                "status": "loading",
                **self.progress.to_dict(),
                "error": {"code": 503, "message": "Loading model", "type": "unavailable_error"},
            }
        why = self.load_error or (self.engine.failure if self.engine else "")
        if not why and self.engine and self.engine.stuck:
            why = "the engine has shown no sign of life for long"
        if not why and self.stopping:
            why = "the server is shutting down"
        if why:
            return 503, {"status": "error", "error": {"code": 503, "message": why, "type": "unavailable_error"}}
        assert self.engine is not None
        notes = getattr(getattr(self.engine.model, "ktx", None), "notes", [])
        return 200, {
            "status": "ok",
            "restarts": self.engine.restarts,
            "notes": [note._asdict() for note in notes],
        }

    def stop(self) -> None:
        """Ends what runs: each stream gets its last words."""
        self.stopping = True
        if self.engine is not None:
            self.engine.close()


def default_sampling(model: Any) -> dict[str, Any]:
    """What a model's generation_config.json says of sampling; OpenAI's temperature of 1 where it says nothing."""
    own = getattr(model, "generation_config", None)
    if getattr(own, "do_sample", None) is False:
        return {"temperature": 0.0}
    names = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")
    found = {name: getattr(own, name, None) for name in names}
    return {"temperature": 1.0} | {name: value for name, value in found.items() if value is not None}
