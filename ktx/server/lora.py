"""Loads, unloads and lists LoRA adapters at run time.

The routes are vLLM's /v1/load_lora_adapter and /v1/unload_lora_adapter, and llama.cpp's /lora-adapters.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from starlette.responses import Response

from ktx.engine.engine import Engine
from ktx.errors import BadFile, DoesNotFit, UsageError
from ktx.server.errors import APIError
from ktx.server.model_names import LATEST_TAG, ModelNames
from ktx.server.protocol.openai import LoadAdapter, LoraUse, UnloadAdapter
from ktx.server.state import LoadedModel, ServerSettings
from ktx.weights.gguf_files import is_gguf
from ktx.weights.lora import CONFIG_FILE, WEIGHTS_FILE, AdapterUse

log = logging.getLogger("ktx.server")
T = TypeVar("T")


async def load(engine: Engine, names: ModelNames, root: Path, fields: LoadAdapter) -> Response:
    """Loads an adapter under a new name.

    Args:
        engine: the engine.
        names: the names, to which the adapter's is added.
        root: the folder --lora-dir, which has the adapter.
        fields: the request.

    Raises:
        APIError: 404, the path does not exist; 400, it is not an adapter of this model, is outside of the folder or the
            name is in use; 503, there is not enough memory.
    """
    name = _check_name(names, fields.lora_name)
    path = resolve_adapter_path(root, fields.lora_path)

    async def run_load() -> None:
        """Loads the adapter, while no other one is loaded or unloaded; the engine reads it in another thread."""
        async with names.lock:
            if name in names.adapters and not fields.load_inplace:
                raise APIError(400, f"The lora adapter {name!r} has already been loaded.", "lora_name")
            try:
                await asyncio.to_thread(engine.load_lora, path, name, replace=bool(fields.load_inplace))
            except (BadFile, UsageError) as error:
                raise APIError(400, str(error), "lora_path") from error
            except DoesNotFit as error:
                raise APIError(503, str(error)) from error
            if name not in names.adapters:
                names.add_adapter(name)

    await run_to_completion(run_load())
    log.info("loaded the adapter %s from %s", name, path)
    return Response(f"Success: LoRA adapter '{name}' added successfully.", media_type="text/plain")


async def unload(engine: Engine, names: ModelNames, fields: UnloadAdapter) -> Response:
    """Unloads an adapter for new requests; requests that run or wait keep it until they end.

    Args:
        engine: the engine.
        names: the names, from which the adapter's is removed.
        fields: the request.

    Raises:
        APIError: 404, no adapter has the name.
    """
    name = fields.lora_name

    async def run_unload() -> None:
        """Unloads the adapter, while no other one is loaded or unloaded."""
        async with names.lock:
            if name not in names.adapters:
                raise APIError(404, f"The lora adapter {name!r} cannot be found.", "lora_name")
            names.remove_adapter(name)
            await asyncio.to_thread(engine.unload_lora, name)

    await run_to_completion(run_unload())
    log.info("unloaded the adapter %s", name)
    return Response(f"Success: LoRA adapter '{name}' removed successfully.", media_type="text/plain")


def resolve_adapters(names: ModelNames, model: str, lora: Sequence[LoraUse] | None) -> tuple[AdapterUse, ...]:
    """Returns the adapters that a request uses.

    Args:
        names: names of the model and of its adapters.
        model: the model name of the request, which may be an adapter's.
        lora: llama.cpp's list of adapter ids and scales, which is only allowed with the base model.

    Raises:
        APIError: 400, an id is unknown, or `lora` is given although the model is an adapter; 404, the adapter was
            unloaded since the request arrived.
    """
    names.check(model)
    adapter = names.adapter(model)
    if lora is None:
        return (AdapterUse(adapter),) if adapter else ()
    if adapter:
        raise APIError(400, f"lora: the model {model!r} is an adapter; use model {names.first!r}", "lora")
    by_id = {adapter_id: name for name, adapter_id in names.adapters.items()}
    scales = {use.id: use.scale for use in lora}  # the last entry of an adapter wins
    if unknown := [adapter_id for adapter_id in scales if adapter_id not in by_id]:
        raise APIError(400, f"lora: no adapter has the id {unknown[0]}; /lora-adapters lists them", "lora")
    return tuple(AdapterUse(by_id[adapter_id], scale) for adapter_id, scale in sorted(scales.items()) if scale)


def list_adapters(model: LoadedModel) -> list[dict[str, Any]]:
    """Lists the adapters in llama.cpp's format.

    The scale is the one of a request that names no adapter: 0, because the base model alone answers it.
    """
    return [
        {"id": adapter_id, "path": model.path(name), "scale": 0.0, "task_name": "", "prompt_prefix": ""}
        for name, adapter_id in model.names.adapters.items()
    ]


async def run_to_completion(work: Awaitable[T]) -> T:
    """Awaits `work`, also after the client disconnects: the engine and the list of adapters must stay consistent."""
    return await asyncio.shield(asyncio.ensure_future(work))


def adapter_root(settings: ServerSettings) -> Path:
    """Returns the folder that adapters may be loaded from. Raises APIError (404) without --lora-dir."""
    if settings.lora_dir is None:
        raise APIError(404, "this server does not load or unload adapters; start ktx serve with --lora-dir DIR")
    return settings.lora_dir


def _check_name(names: ModelNames, name: str) -> str:
    """Returns the name of a new adapter. Raises APIError (400) if it is invalid or a name of the model."""
    if not name.isprintable() or not name.strip() or name.endswith(LATEST_TAG):
        raise APIError(400, f"{name!r} is not a valid name for an adapter", "lora_name")
    if name in names.models:
        raise APIError(400, f"{name!r} is the model's name; choose another one", "lora_name")
    return name


def resolve_adapter_path(root: Path, text: str) -> Path:
    """Returns the path of an adapter that a request names, absolute or relative to `root`.

    Raises:
        APIError: 400, the path or one of its files is outside of `root` (symbolic links are resolved) or cannot be
            read; 404, it does not exist.
    """
    outside_error = APIError(400, f"{text!r} is not in the folder of adapters (--lora-dir)", "lora_path")
    root = root.resolve()
    try:
        path = root / text
        resolved = path.resolve()
        # A link to a file keeps its own name, because the files of the hub's cache are links.
        path = resolved if resolved.is_dir() else path.parent.resolve() / path.name
        if not all(candidate.is_relative_to(root) for candidate in (resolved, path)):
            raise outside_error
        if not resolved.exists():
            raise APIError(404, f"No adapter found for {text!r}", "lora_path")
        for file in _adapter_files(path):
            if not file.resolve().is_relative_to(root):
                raise outside_error
            if not file.is_file():
                raise APIError(400, f"{text!r}: {file.name} is not a file", "lora_path")
    except RuntimeError as error:  # a cycle of links, before Python 3.13
        raise APIError(404, f"No adapter found for {text!r}", "lora_path") from error
    except (OSError, ValueError) as error:  # a name that is too long or invalid, no access
        raise APIError(400, f"{text!r} cannot be read: {type(error).__name__}", "lora_path") from error
    return path


def _adapter_files(path: Path) -> list[Path]:
    """Returns the existing files that an adapter is read from, all of which must be inside --lora-dir."""
    folder = path if path.is_dir() else path.parent
    known = [folder / name for name in (CONFIG_FILE, WEIGHTS_FILE)]
    if path.is_dir():
        known += [file for file in folder.iterdir() if file.suffix.lower() == ".gguf"]
    elif path.suffix.lower() == ".gguf" or (path.is_file() and is_gguf(path)):
        known = [path]
    else:
        known.append(path)
    return [file for file in known if file.is_symlink() or file.exists()]
