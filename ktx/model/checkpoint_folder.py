"""Checkpoint folders: writes tensors in pieces to their offsets in safetensors files, then configuration and tokenizer.

Files are drafts until all of them are complete. config.json is written last and removed first, so a folder whose
writing was interrupted does not look complete.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from ktx.errors import DoesNotFit, UsageError
from ktx.loader.load_weights import ProgressSink, progress_bar

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"} | {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
Pieces = Iterable[tuple[str, int, torch.Tensor]]  # name of a tensor, offset of the piece in values, values


@dataclass
class TensorSlot:
    """Position of a tensor in the files: index of the file, and offset in bytes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: int = 0
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class CheckpointContent:
    """The content of a checkpoint's files.

    Attributes:
        config: the configuration.
        places: all tensors, in the order of the files.
        pieces: the values of the tensors.
        metadata: returns a file's metadata by the names of its tensors.
    """

    config: Any
    places: dict[str, TensorSlot]
    pieces: Pieces
    metadata: Callable[[Iterable[str]], dict[str, str]]


@dataclass(frozen=True)
class CheckpointFolder:
    """A folder for a checkpoint, in files of at most `max_shard_bytes` or one tensor; `variant` is in their names."""

    path: Path
    max_shard_bytes: int
    variant: str | None = None

    @classmethod
    def from_arguments(
        cls, path: str | os.PathLike[str], max_shard_size: int | str, variant: str | None
    ) -> CheckpointFolder:
        """Checks save_pretrained's arguments and returns the target folder; UsageError for an invalid argument."""
        limit, folder = _parse_size(max_shard_size), Path(path)
        if not os.fspath(path):
            raise UsageError("save_pretrained: the path of the folder is empty")
        if variant and os.sep in variant:
            raise UsageError(f"save_pretrained: variant {variant!r} cannot be part of a file name")
        if folder.is_file():
            raise UsageError(f"save_pretrained: {folder} is a file; give a folder")
        return cls(folder, limit, variant)

    def write(self, model: Any, content: CheckpointContent, remedy: str, progress: bool | ProgressSink) -> None:
        """Writes tensors, configuration, generation configuration and tokenizer.

        Tensors are written to drafts, which get their names once all are complete. The old config.json is removed
        before that and the new one written last, so that an interrupted save does not look like a complete checkpoint.

        Args:
            model: the loaded model.
            content: configuration and tensors.
            remedy: what a user can do if the disk is full, for the error's message.
            progress: as in ktx.load.

        Raises:
            DoesNotFit: the disk has too little space; the folder is unchanged.
            UsageError: the pieces of `content` do not contain all values.
        """
        places = content.places
        stem = f"model.{self.variant}" if self.variant else "model"
        files = _assign_places(places, self.max_shard_bytes, stem)
        num_bytes = sum(place.nbytes for place in places.values())
        self.path.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(self.path).free
        if num_bytes > free_bytes:
            raise DoesNotFit(
                f"save_pretrained: {self.path}: the model needs {num_bytes / 1e9:.1f} GB,"
                f" but {free_bytes / 1e9:.1f} GB are free on that disk; {remedy}"
            )
        drafts = [self.path / f"{name}.{os.getpid()}.part" for name in files]
        try:
            with progress_bar(num_bytes, progress, "saving") as advance:
                _write(drafts, content, advance)
            (self.path / "config.json").unlink(missing_ok=True)
            self._index_path().unlink(missing_ok=True)
            for draft, name in zip(drafts, files, strict=True):
                draft.replace(self.path / name)
        finally:
            for draft in drafts:
                draft.unlink(missing_ok=True)
        self._finish(files, stem, places, model)
        _write_settings(model, content.config, self.path)

    def _index_path(self) -> Path:
        """Path of the index of several files."""
        return self.path / (
            f"model.safetensors.index.{self.variant}.json" if self.variant else "model.safetensors.index.json"
        )

    def _finish(self, files: list[str], stem: str, places: dict[str, TensorSlot], model: Any) -> None:
        """Writes the index of several files, and removes files of an earlier save, which a loader would find too."""
        for earlier in self.path.glob(f"{stem}*.safetensors"):
            if earlier.name not in files and re.fullmatch(
                rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors", earlier.name
            ):
                earlier.unlink()
        if len(files) == 1:
            return
        index = {
            "metadata": {
                "total_parameters": model.num_parameters(),
                "total_size": sum(place.nbytes for place in places.values()),
            },
            "weight_map": {name: files[place.file] for name, place in sorted(places.items())},
        }
        self._index_path().write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _parse_size(size: int | str) -> int:
    """Parses a size as transformers does: a number of bytes, or a text such as "5GB"."""
    if isinstance(size, int):
        number, unit = str(size), ""
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
        number, unit = (match[1], match[2].upper()) if match else ("0", "")
    num_bytes = int(float(number) * UNITS.get(unit, 0))
    if num_bytes < 1:
        raise UsageError(
            f"save_pretrained: max_shard_size {size!r} is not a size;"
            f" use bytes, or a number with one of {' '.join(UNITS)}"
        )
    return num_bytes


def _assign_places(places: dict[str, TensorSlot], limit: int, stem: str) -> list[str]:
    """Sets file and offset of every tensor; returns the names of the files.

    A tensor begins a new file when the current one would exceed `limit` bytes.
    """
    file, offset = 0, 0
    for place in places.values():
        if offset and offset + place.nbytes > limit:
            file, offset = file + 1, 0
        place.file, place.offset = file, offset
        offset += place.nbytes
    count = file + 1
    return (
        [f"{stem}.safetensors"]
        if count == 1
        else [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    )


def _write(drafts: list[Path], content: CheckpointContent, advance: Callable[[int], None]) -> None:
    """Writes the headers of all files, then every piece at its offset, in any order.

    Raises UsageError for a missing piece. Offsets are known beforehand from the shapes, so no file has to be in memory.
    """
    places, data_offsets = content.places, []
    for i, draft in enumerate(drafts):
        own_places = {name: place for name, place in places.items() if place.file == i}
        header: dict[str, Any] = {"__metadata__": content.metadata(own_places)}
        for name, place in own_places.items():
            header[name] = {
                "dtype": DTYPE_NAMES[place.dtype],
                "shape": list(place.shape),
                "data_offsets": [place.offset, place.offset + place.nbytes],
            }
        header_json = json.dumps(header, separators=(",", ":")).encode()
        header_json += b" " * (-len(header_json) % 8)
        draft.write_bytes(len(header_json).to_bytes(8, "little") + header_json)
        data_offsets.append(8 + len(header_json))
        os.truncate(draft, data_offsets[-1] + sum(place.nbytes for place in own_places.values()))
    written = dict.fromkeys(places, 0)
    handles = [os.open(draft, os.O_WRONLY) for draft in drafts]
    try:
        for name, first, values in content.pieces:
            place = places[name]
            raw = values.detach().to("cpu", place.dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data
            position, num_written = data_offsets[place.file] + place.offset + first * place.dtype.itemsize, 0
            while num_written < len(raw):
                num_written += os.pwrite(handles[place.file], raw[num_written:], position + num_written)
            written[name] += len(raw)
            advance(len(raw))
        for handle in handles:
            os.fsync(handle)
    finally:
        for handle in handles:
            os.close(handle)
    if incomplete := [name for name, nbytes in written.items() if nbytes != places[name].nbytes]:
        raise UsageError(
            f"save_pretrained: {', '.join(sorted(incomplete)[:3])} could not be written completely;"
            " use save_original_format=False"
        )


def _write_settings(model: Any, config: Any, path: Path) -> None:
    """Writes generation configuration and tokenizer, and last the configuration, which marks the folder as complete."""
    if model.can_generate():
        settings = copy.deepcopy(model.generation_config)
        settings.disable_compile = None  # it was set by ktx.loader.meta_model
        settings.save_pretrained(path)
    tokenizer = model.ktx.tokenizer
    if tokenizer is not None and not any((path / name).exists() for name in TOKENIZER_FILES):
        tokenizer.save_pretrained(path)
    config.save_pretrained(path)


def config_of(model: Any, dtype: torch.dtype, quantization: dict[str, Any] | None = None) -> Any:
    """Returns a copy of the model's configuration for weights of type `dtype`.

    `quantization` becomes the quantization_config; without it the weights are floats.
    """
    config = copy.deepcopy(model.config)
    config.dtype, config.architectures = str(dtype)[6:], [type(model).__name__]  # [6:]: without "torch."
    if quantization is not None:
        config.quantization_config = quantization
    elif hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def checkpoint_state(model: Any) -> dict[str, torch.Tensor]:
    """Returns the model's state dict with a checkpoint's names."""
    return {checkpoint_name(name): value for name, value in model.state_dict().items()}


def checkpoint_name(name: str) -> str:
    """Returns a parameter's name in a checkpoint: the layer for multi-token prediction follows the last layer."""
    return re.sub(r"^mtp\.layers\.", "model.layers.", name)


def omitted_names(model: Any, state: dict[str, torch.Tensor]) -> list[str]:
    """Returns the names that a checkpoint omits: tied parameters, and those that the family's modeling code omits.

    A tied parameter that no longer shares its origin's storage has values of its own and is written.
    """
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    duplicates = [
        name
        for name, origin in tied.items()
        if name in state and origin in state and _storage_address(state[name]) == _storage_address(state[origin])
    ]
    return [
        *duplicates,
        *(
            name
            for name in getattr(model, "_keys_to_ignore_on_save", None) or ()
            if name in state and name not in duplicates
        ),
    ]


def _storage_address(value: torch.Tensor) -> int:
    """Address of a tensor's storage."""
    address: int = value.untyped_storage().data_ptr()
    return address
