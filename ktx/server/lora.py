"""LoRA adapters that come and go while the server runs: vLLM's /v1/load_lora_adapter and /v1/unload_lora_adapter, and llama.cpp's /lora-adapters."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from starlette.responses import Response

from ktx.errors import BadFile, DoesNotFit, UsageError
from ktx.ops.lora import Use
from ktx.server.errors import APIError
from ktx.server.model_names import LATEST_TAG
from ktx.server.protocol.openai import LoadAdapter, LoraUse, UnloadAdapter
from ktx.server.state import ServerState
from ktx.weights.gguf_files import is_gguf
from ktx.weights.lora import CONFIG, WEIGHTS

log = logging.getLogger("ktx.server")
T = TypeVar("T")


async def load(state: ServerState, fields: LoadAdapter) -> Response:
    """An adapter below --lora-dir, under a name of its own. Problem 404 for a path where nothing is, 400 for one that is no adapter of this model."""
    root = adapter_root(state)
    engine, _, _ = state.require_ready()
    name = _name(state, fields.lora_name)
    path = resolve_adapter_path(root, fields.lora_path)

    async def loaded() -> None:
        async with state.adapters_lock:
            if name in state.adapters and not fields.load_inplace:
                raise APIError(400, f"The lora adapter {name!r} has already been loaded.", "lora_name")
            try:
                await asyncio.to_thread(engine.load_lora, path, name, replace=bool(fields.load_inplace))
            except (BadFile, UsageError) as error:
                raise APIError(400, str(error), "lora_path") from error
            except DoesNotFit as error:
                raise APIError(503, str(error)) from error
            if name not in state.adapters:
                state.add_adapter(name)

    await run_to_completion(loaded())
    log.info("adapter %s is loaded from %s", name, path)
    return Response(f"Success: LoRA adapter '{name}' added successfully.", media_type="text/plain")


async def unload(state: ServerState, fields: UnloadAdapter) -> Response:
    """From now on no request finds the adapter; those that run or wait are answered by it to their end. Problem 404 for a name that is none's."""
    adapter_root(state)
    engine, _, _ = state.require_ready()
    name = fields.lora_name

    async def unloaded() -> None:
        async with state.adapters_lock:
            if name not in state.adapters:
                raise APIError(404, f"The lora adapter {name!r} cannot be found.", "lora_name")
            state.adapters = {one: number for one, number in state.adapters.items() if one != name}
            await asyncio.to_thread(engine.unload_lora, name)

    await run_to_completion(unloaded())
    log.info("adapter %s is unloaded", name)
    return Response(f"Success: LoRA adapter '{name}' removed successfully.", media_type="text/plain")


def resolve_adapters(state: ServerState, model: str, lora: Sequence[LoraUse] | None) -> tuple[Use, ...]:
    """The adapters that a request is answered by: llama.cpp's list, which goes with the model itself, or the one that is its model. Problem 400 for a number that is none's."""
    named = state.adapter_of(model)
    if lora is None:
        return tuple(map(Use, named))
    if named:
        raise APIError(400, f"lora: the model {model!r} is an adapter itself; name {state.models[0]!r}", "lora")
    by_number = {number: name for name, number in state.adapters.items()}
    scales = {one.id: one.scale for one in lora}  # of an adapter that stands there twice, the last
    if unknown := [number for number in scales if number not in by_number]:
        raise APIError(400, f"lora: no adapter has the id {unknown[0]}; /lora-adapters lists them", "lora")
    return tuple(Use(by_number[number], scale) for number, scale in sorted(scales.items()) if scale)


def list_adapters(state: ServerState) -> list[dict[str, Any]]:
    """As llama.cpp lists them. The scale is that of requests which name none: those are answered by the model alone."""
    state.require_ready()
    return [
        {"id": number, "path": state.path_of(name), "scale": 0.0, "task_name": "", "prompt_prefix": ""}
        for name, number in state.adapters.items()
    ]


async def run_to_completion(work: Awaitable[T]) -> T:
    """Also where the client leaves: what the engine has and what is listed must not differ."""
    return await asyncio.shield(asyncio.ensure_future(work))


def adapter_root(state: ServerState) -> Path:
    """The folder below which adapters may be. Problem 404 where the operator names none."""
    if state.settings.lora_dir is None:
        raise APIError(404, "requests load and unload adapters only where ktx serve is given --lora-dir DIR")
    return state.settings.lora_dir


def _name(state: ServerState, name: str) -> str:
    """Problem 400 for one that could be taken for another model's."""
    if not name.isprintable() or not name.strip() or name.endswith(LATEST_TAG):
        raise APIError(400, f"{name!r} is no name for an adapter", "lora_name")
    if name in state.models:
        raise APIError(400, f"{name!r} is the model's name; give another one", "lora_name")
    return name


def resolve_adapter_path(root: Path, text: str) -> Path:
    """The place that a request names, absolute or from `root` on. Problem 400 for one outside of it, by symbolic links too, 404 where nothing is."""
    outside = APIError(400, f"{text!r} is not below the folder of adapters (--lora-dir)", "lora_path")
    root = root.resolve()
    try:
        path = root / text
        whole = path.resolve()
        path = (
            whole if whole.is_dir() else path.parent.resolve() / path.name
        )  # a link's own name, in a cache of the hub
        if not all(place.is_relative_to(root) for place in (whole, path)):
            raise outside
        if not whole.exists():
            raise APIError(404, f"No adapter found for {text!r}", "lora_path")
        for file in _files(path):
            if not file.resolve().is_relative_to(root):
                raise outside
            if not file.is_file():
                raise APIError(400, f"{text!r}: {file.name} is no file", "lora_path")
    except RuntimeError as error:  # links in a ring, before Python 3.13
        raise APIError(404, f"No adapter found for {text!r}", "lora_path") from error
    except (OSError, ValueError) as error:  # names that are too long or none, no access
        raise APIError(400, f"{text!r} cannot be read: {type(error).__name__}", "lora_path") from error
    return path


def _files(path: Path) -> list[Path]:
    """The files that an adapter is read from."""
    folder = path if path.is_dir() else path.parent
    known = [folder / name for name in (CONFIG, WEIGHTS)]
    if path.is_dir():
        known += [file for file in folder.iterdir() if file.suffix.lower() == ".gguf"]
    elif path.suffix.lower() == ".gguf" or (path.is_file() and is_gguf(path)):
        known = [path]
    else:
        known.append(path)
    return [file for file in known if file.is_symlink() or file.exists()]
