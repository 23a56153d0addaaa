"""A checkpoint's folder: tensors written piece by piece to their places in safetensors files, then configuration, generation settings and tokenizer.

Files are drafts until all are whole. config.json is the last thing that is written and the first that goes, so a folder whose writing was stopped does not look whole.
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

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"} | {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
Pieces = Iterable[tuple[str, int, torch.Tensor]]  # name of a tensor, numbers of it that come before, numbers


@dataclass
class Place:
    """Where a tensor is in a file that is being written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: int = 0
    at: int = 0

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Folder:
    """Where a model is written, in files of at most `limit` bytes (or one tensor), which have `variant` in their names."""

    path: Path
    limit: int
    variant: str | None = None

    @classmethod
    def of(cls, path: str | os.PathLike[str], max_shard_size: int | str, variant: str | None) -> Folder:
        """UsageError for a file, or a size or a name that is none."""
        limit, folder = _bytes(max_shard_size), Path(path)
        if not os.fspath(path):
            raise UsageError("save_pretrained: the folder's name is empty")
        if variant and os.sep in variant:
            raise UsageError(f"save_pretrained: variant {variant!r} is no part of a file's name")
        if folder.is_file():
            raise UsageError(f"save_pretrained: {folder} is a file; give a folder")
        return cls(folder, limit, variant)

    def write(
        self,
        model: Any,
        config: Any,
        places: dict[str, Place],
        pieces: Pieces,
        metadata: Callable[[Iterable[str]], dict[str, str]],
        remedy: str,
        progress: bool | ProgressSink,
    ) -> None:
        """All tensors of `places`, then what else a model has. `metadata` is of a file with these tensors. DoesNotFit, with the remedy, where the disk has too little space; the folder is then as it was."""
        stem = f"model.{self.variant}" if self.variant else "model"
        files = _lay_out(places, self.limit, stem)
        need = sum(place.nbytes for place in places.values())
        self.path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.path).free
        if need > free:
            raise DoesNotFit(
                f"save_pretrained: {self.path}: {need / 1e9:.1f} GB are to be written, {free / 1e9:.1f} GB are free on that disk; {remedy}"
            )
        drafts = [self.path / f"{name}.{os.getpid()}.part" for name in files]
        try:
            with progress_bar(need, progress, "saving") as advance:
                _write(drafts, places, pieces, metadata, advance)
            (self.path / "config.json").unlink(missing_ok=True)
            self._index().unlink(missing_ok=True)
            for draft, name in zip(drafts, files, strict=True):
                draft.replace(self.path / name)
        finally:
            for draft in drafts:
                draft.unlink(missing_ok=True)
        self._tidy(files, stem, places, model)
        _settings(model, config, self.path)

    def _index(self) -> Path:
        return self.path / (
            f"model.safetensors.index.{self.variant}.json" if self.variant else "model.safetensors.index.json"
        )

    def _tidy(self, files: list[str], stem: str, places: dict[str, Place], model: Any) -> None:
        """The index of several files; what an earlier save has left there goes."""
        for old in self.path.glob(f"{stem}*.safetensors"):
            if old.name not in files and re.fullmatch(
                rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors", old.name
            ):
                old.unlink()
        if len(files) == 1:
            return
        about = {
            "metadata": {
                "total_parameters": model.num_parameters(),
                "total_size": sum(place.nbytes for place in places.values()),
            },
            "weight_map": {name: files[place.file] for name, place in sorted(places.items())},
        }
        self._index().write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _bytes(size: int | str) -> int:
    """A size as transformers takes it: a number of bytes, or "5GB"."""
    if isinstance(size, int):
        number, unit = str(size), ""
    else:
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
        number, unit = (found[1], found[2].upper()) if found else ("0", "")
    bytes_ = int(float(number) * UNITS.get(unit, 0))
    if bytes_ < 1:
        raise UsageError(
            f"save_pretrained: max_shard_size {size!r} is no size; give bytes, or a number with one of {' '.join(UNITS)}"
        )
    return bytes_


def _lay_out(places: dict[str, Place], limit: int, stem: str) -> list[str]:
    """Gives every tensor its file and place; the files' names."""
    file, at = 0, 0
    for place in places.values():
        if at and at + place.nbytes > limit:
            file, at = file + 1, 0
        place.file, place.at = file, at
        at += place.nbytes
    count = file + 1
    return (
        [f"{stem}.safetensors"]
        if count == 1
        else [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    )


def _write(
    drafts: list[Path],
    places: dict[str, Place],
    pieces: Pieces,
    metadata: Callable[[Iterable[str]], dict[str, str]],
    advance: Callable[[int], None],
) -> None:
    """Every tensor to its place."""
    begins = []
    for i, draft in enumerate(drafts):
        own = {name: place for name, place in places.items() if place.file == i}
        header: dict[str, Any] = {"__metadata__": metadata(own)}
        for name, place in own.items():
            header[name] = {
                "dtype": NAMES[place.dtype],
                "shape": list(place.shape),
                "data_offsets": [place.at, place.at + place.nbytes],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        draft.write_bytes(len(text).to_bytes(8, "little") + text)
        begins.append(8 + len(text))
        os.truncate(draft, begins[-1] + sum(place.nbytes for place in own.values()))
    written = dict.fromkeys(places, 0)
    handles = [os.open(draft, os.O_WRONLY) for draft in drafts]
    try:
        for name, before, values in pieces:
            place = places[name]
            raw = values.detach().to("cpu", place.dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data
            at, done = begins[place.file] + place.at + before * place.dtype.itemsize, 0
            while done < len(raw):
                done += os.pwrite(handles[place.file], raw[done:], at + done)
            written[name] += len(raw)
            advance(len(raw))
        for handle in handles:
            os.fsync(handle)
    finally:
        for handle in handles:
            os.close(handle)
    if short := [name for name, nbytes in written.items() if nbytes != places[name].nbytes]:
        raise UsageError(
            f"save_pretrained: not all was written of {', '.join(sorted(short)[:3])}; give save_original_format=False"
        )


def _settings(model: Any, config: Any, path: Path) -> None:
    """Generation settings, tokenizer, and at last the configuration."""
    if model.can_generate():
        settings = copy.deepcopy(model.generation_config)
        settings.disable_compile = None  # ktx.loader.meta_model sets it
        settings.save_pretrained(path)
    tokenizer = model.ktx.tokenizer
    if tokenizer is not None and not any((path / name).exists() for name in TOKENIZER):
        tokenizer.save_pretrained(path)
    config.save_pretrained(path)


def config_of(model: Any, dtype: torch.dtype, quantization: dict[str, Any] | None = None) -> Any:
    """A copy of the model's configuration, for weights of a type, which are floats unless something is said of a quantisation."""
    config = copy.deepcopy(model.config)
    config.dtype, config.architectures = str(dtype)[6:], [type(model).__name__]
    if quantization is not None:
        config.quantization_config = quantization
    elif hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def state_of(model: Any) -> dict[str, torch.Tensor]:
    """The model's state by the names that a checkpoint has: a layer for multi-token prediction is behind the last one."""
    return {in_checkpoint(name): value for name, value in model.state_dict().items()}


def in_checkpoint(name: str) -> str:
    """Such a name."""
    return re.sub(r"^mtp\.layers\.", "model.layers.", name)


def left_out(model: Any, state: dict[str, torch.Tensor]) -> list[str]:
    """Names that a checkpoint does not hold: tied ones, whose twin is there, and what the family leaves out."""
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    same = [
        name
        for name, twin in tied.items()
        if name in state and twin in state and _place(state[name]) == _place(state[twin])
    ]
    return [
        *same,
        *(name for name in getattr(model, "_keys_to_ignore_on_save", None) or () if name in state and name not in same),
    ]


def _place(value: torch.Tensor) -> int:
    place: int = value.untyped_storage().data_ptr()
    return place
