"""The state of a server: the names of its model, loading progress, and the model once it is loaded."""

from __future__ import annotations

import datetime
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
from ktx.server.model_names import ModelNames
from ktx.server.responses.store import ResponseStore

log = logging.getLogger("ktx.server")


@dataclass(frozen=True)
class ServerSettings:
    """Options of the command line that apply to requests."""

    max_new_tokens: int | None = None  # default limit of a request; None: the rest of the context
    force_think: bool = False
    chat_template: str | None = None
    log_prompts: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)  # overrides the model's default sampling parameters
    max_stored_responses: int = 1000  # responses of /v1/responses that later requests can refer to
    keepalive_s: float = 15.0  # seconds between comments of a stream while there is no event
    lora_dir: Path | None = None  # folder from which requests may load adapters; None: they may not


@dataclass
class Progress:
    """Loading progress: `done` of `total` bytes of weights."""

    total: int = 0
    done: int = 0
    started: float = field(default_factory=time.monotonic)

    def advance(self, nbytes: int) -> None:
        """Adds bytes that were read."""
        self.done += nbytes

    def to_dict(self) -> dict[str, Any]:
        """Returns percent and estimated seconds left (None before the first byte), for /health."""
        elapsed_s = time.monotonic() - self.started
        remaining_s = round(elapsed_s * (self.total - self.done) / self.done, 1) if self.done else None
        return {"percent": round(100 * self.done / self.total, 1) if self.total else 0.0, "eta_seconds": remaining_s}


class LoadedModel:
    """The loaded model: its engine, and what converts requests to the engine's input.

    Args:
        engine: the engine.
        names: names of the model and of its adapters.
        settings: options of the command line.

    Raises:
        BadFile: a chat template cannot render prompts.
    """

    def __init__(self, engine: Engine, names: ModelNames, settings: ServerSettings):
        tokenizer, config = engine.tokenizer, engine.model.config
        self.engine, self.names, self.settings = engine, names, settings
        self.prompts = PromptRenderer(tokenizer, config.model_type, settings.chat_template)
        self.grammars = GrammarCompiler(tokenizer, config.vocab_size, sorted(engine.stop_ids))
        # sampling parameters of requests that do not set them
        self.defaults = default_sampling(engine.model) | dict(settings.sampling)
        self.fingerprint = f"ktx_{uuid.uuid4().hex[:10]}"
        self.warnings_sent: set[str] = set()

    def warn_once(self, text: str) -> None:
        """Logs a warning that applies to every request, the first time only."""
        if text not in self.warnings_sent:
            self.warnings_sent.add(text)
            log.warning("%s: %s", self.names.first, text)

    def path(self, name: str) -> str:
        """Returns the path that an adapter was loaded from; for the model its name."""
        adapter = self.engine.runner.adapters.known.get(self.names.adapter(name))
        return adapter.path if adapter else name


class ServerState:
    """What the application is made of: names, settings, the stored responses and, once it is loaded, the model.

    `model` is None until the model is loaded; `load_error` is why it could not be loaded.

    Args:
        models: names that requests may give as their model; the first one is reported.
        settings: options of the command line.
        adapters: names of LoRA adapters that are loaded at the start.
    """

    def __init__(self, models: tuple[str, ...], settings: ServerSettings | None = None, adapters: tuple[str, ...] = ()):
        """Starts without a model, so that /health can answer while it is loaded."""
        self.names, self.settings = ModelNames(models, adapters), settings or ServerSettings()
        self.created = int(time.time())
        self.created_iso = (
            datetime.datetime.fromtimestamp(self.created, datetime.UTC).isoformat().replace("+00:00", "Z")
        )
        self.progress = Progress()
        self.response_store = ResponseStore(self.settings.max_stored_responses)
        self.model: LoadedModel | None = None
        self.bandwidth: float | None = None  # GB/s, memory read bandwidth measured before the model was loaded
        self.load_error = ""
        self.is_shutting_down = False
        self.on_finished: Callable[[Finished], None] | None = None  # counts and logs a finished request

    @property
    def engine(self) -> Engine | None:
        """The engine of the loaded model."""
        return self.model.engine if self.model else None

    def set_engine(self, engine: Engine) -> None:
        """Installs the loaded engine; from now on requests are answered.

        `model` is set last, because other threads read it to see whether the model is loaded.
        """
        model = LoadedModel(engine, self.names, self.settings)
        engine.on_finished = self.on_finished
        self.model = model

    def load(
        self, make: Callable[[ServerState], Engine], on_failure: Callable[[BaseException], None] = lambda error: None
    ) -> threading.Thread:
        """Loads the engine in a new thread, so that /health is available meanwhile.

        Args:
            make: creates the engine.
            on_failure: called with the error when loading failed.
        """

        def run() -> None:
            """Loads the engine; an error becomes `load_error`."""
            try:
                self.set_engine(make(self))
            # Every error must reach /health and the caller of the server.
            except BaseException as error:
                self.load_error = str(error) if isinstance(error, KtxError) else f"{type(error).__name__}: {error}"
                on_failure(error)

        thread = threading.Thread(target=run, name="ktx-loading", daemon=True)
        thread.start()
        return thread

    def require_model(self, name: str | None = None) -> LoadedModel:
        """Returns the loaded model.

        Args:
            name: the model name of a request; None: any.

        Raises:
            APIError: 404, no model has the name; 503, the model is not loaded, could not be loaded or the server is
                shutting down.
        """
        if name is not None:
            self.names.check(name)
        if self.is_shutting_down:
            raise APIError(503, "the server is shutting down", retry=5)
        if self.load_error:
            raise APIError(503, f"the model could not be loaded: {self.load_error}")
        if self.model is None:
            progress = self.progress.to_dict()
            raise APIError(
                503, f"Loading model: {progress['percent']:.0f} %", retry=max(1, int(progress["eta_seconds"] or 5))
            )
        if self.model.engine.failure:
            raise APIError(503, self.model.engine.failure)
        return self.model

    def health(self) -> tuple[int, dict[str, Any]]:
        """Returns the HTTP status and the body of /health: 200 if the engine can answer, else 503 with the reason."""
        engine = self.engine
        if engine is None and not self.load_error:
            return 503, {
                "status": "loading",
                **self.progress.to_dict(),
                "error": {"code": 503, "message": "Loading model", "type": "unavailable_error"},
            }
        reason = self.load_error or (engine.failure if engine else "")
        if not reason and engine and engine.stalled:
            reason = "the engine has stalled: it has made no progress for too long"
        if not reason and self.is_shutting_down:
            reason = "the server is shutting down"
        if reason:
            return 503, {"status": "error", "error": {"code": 503, "message": reason, "type": "unavailable_error"}}
        assert engine is not None
        return 200, {
            "status": "ok",
            "restarts": engine.num_restarts,
            "notes": [note._asdict() for note in engine.model.ktx.notes],
        }

    def stop(self) -> None:
        """Ends all requests; each stream gets its final event."""
        self.is_shutting_down = True
        if self.engine is not None:
            self.engine.close()


def default_sampling(model: Any) -> dict[str, Any]:
    """Returns the sampling parameters of a model's generation_config.json.

    `do_sample: false` means greedy decoding (temperature 0); a missing temperature is 1, as in OpenAI's API.
    """
    config = getattr(model, "generation_config", None)
    if getattr(config, "do_sample", None) is False:
        return {"temperature": 0.0}
    names = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")
    values = {name: getattr(config, name, None) for name in names}
    return {"temperature": 1.0} | {name: value for name, value in values.items() if value is not None}
