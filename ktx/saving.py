"""A loaded model written as a checkpoint of floats that transformers and ktx.load read: dequantised a span at a time, straight to its place in a file."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from ktx.compat import dtype_plan, written_form
from ktx.errors import DoesNotFit, UsageError
from ktx.ops.floats import Dequantized, Floats

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"} | {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
WRITABLE = (torch.float32, torch.float16, torch.bfloat16)
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
EXPERT = re.compile(r"(\.experts\.)(\d+)(\.)")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
Form = Callable[[dict[str, Any]], dict[str, Any]]


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


def save(
    model: Any,
    folder: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
    save_original_format: bool = True,
) -> None:
    """Weights, configuration, generation settings, and the tokenizer unless the folder has one.

    `dtype` is of the floats that are written (default: what the model computes in), but for those that the family keeps in f32. What is dequantised at once is
    at most 64 Mi numbers, or one expert's matrix or one of MLA's. UsageError for a module that cannot say its weights in floats, DoesNotFit where the disk
    has too little space; the folder is then as it was.
    """
    dtype = dtype or model.dtype
    if dtype not in WRITABLE:
        raise UsageError(f"save_pretrained: dtype {dtype} is not written; give one of {', '.join(map(str, WRITABLE))}")
    limit, path = _bytes(max_shard_size), Path(folder)
    if path.is_file():
        raise UsageError(f"save_pretrained: {path} is a file; give a folder")
    state = {
        re.sub(r"^mtp\.layers\.", "model.layers.", name): value for name, value in model.state_dict().items()
    }  # as a checkpoint has it, behind the last layer
    for name in _left_out(model, state):
        del state[name]
    form: Form = written_form(model) if save_original_format else dict
    own_types = dtype_plan(model, dtype)
    whole = form(
        {
            name: torch.empty(value.shape, dtype=_type(own_types, name, value, dtype), device="meta")
            for name, value in state.items()
        }
    )
    places = {name: Place(tuple(value.shape), value.dtype) for name, value in whole.items()}
    files = _lay_out(places, limit, f"model.{variant}" if variant else "model")
    need = sum(place.nbytes for place in places.values())
    path.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path).free
    if need > free:
        raise DoesNotFit(
            f"save_pretrained: {path}: {need / 1e9:.1f} GB of floats in {str(dtype)[6:]}, {free / 1e9:.1f} GB are free on that disk; give dtype=torch.bfloat16, or another disk"
        )
    drafts = [path / f"{name}.{os.getpid()}.part" for name in files]
    try:
        _write(drafts, places, state, form)
        for draft, name in zip(drafts, files, strict=True):
            draft.replace(path / name)
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)
    _tidy(path, files, places, variant, model)
    _settings(model, path, dtype)


def _type(own_types: dict[str, torch.dtype], name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a tensor is written as."""
    if not value.is_floating_point():
        return value.dtype
    return next((own for pattern, own in own_types.items() if re.search(pattern, name)), dtype)


def _left_out(model: Any, state: dict[str, torch.Tensor]) -> list[str]:
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


def _write(drafts: list[Path], places: dict[str, Place], state: dict[str, torch.Tensor], form: Form) -> None:
    """Every tensor to its place."""
    begins = []
    for i, draft in enumerate(drafts):
        own = {name: place for name, place in places.items() if place.file == i}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
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
    written: set[str] = set()
    handles = [os.open(draft, os.O_WRONLY) for draft in drafts]
    try:
        for name, first, values in _pieces(places, state, form):
            place = places[name]
            row = prod(place.shape[1:]) * place.dtype.itemsize
            raw = values.to(place.dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data
            at, done = begins[place.file] + place.at + first * row, 0
            while done < len(raw):
                done += os.pwrite(handles[place.file], raw[done:], at + done)
            written.add(name)
        for handle in handles:
            os.fsync(handle)
    finally:
        for handle in handles:
            os.close(handle)
    if written != places.keys():
        raise UsageError(
            f"save_pretrained: nothing was written for {', '.join(sorted(places.keys() - written)[:3])}; give save_original_format=False"
        )


def _pieces(
    places: dict[str, Place], state: dict[str, torch.Tensor], form: Form
) -> Iterator[tuple[str, int, torch.Tensor]]:
    """A checkpoint's tensors in pieces: name, index in the first dimension, values."""
    alone = _alone(places, state, form)
    if alone is None:  # some are made of several: all at once
        for name, values in form({name: _values(value) for name, value in state.items()}).items():
            yield name, 0, values
        return
    for name, value in state.items():
        same, own = alone[name]
        floats = value.floats if isinstance(value, Dequantized) else None
        if same is not None and floats is not None:
            for first, last in floats.spans():
                yield same, first, floats.read(first, last)
        elif floats is not None and _by_expert(own, floats):
            for first, last in floats.spans():
                for made, values in form({name: floats.read(first, last)}).items():
                    yield _later(made, first), 0, values
        else:
            for made, values in form({name: _values(value)}).items():
                yield made, 0, values


def _alone(
    places: dict[str, Place], state: dict[str, torch.Tensor], form: Form
) -> dict[str, tuple[str | None, dict[str, tuple[int, ...]]]] | None:
    """Of each parameter what is made of it: its name where it stays as it is, and all names with their shapes; None where a tensor is made of several."""
    found = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in state.items():
        given = torch.empty(value.shape, device="meta")
        made = form({name: given})
        own = {key: tuple(values.shape) for key, values in made.items()}
        same = next((key for key, values in made.items() if values is given), None)
        found[name] = same, own
        shapes |= own
    return found if shapes == {name: place.shape for name, place in places.items()} else None


def _by_expert(own: dict[str, tuple[int, ...]], floats: Floats) -> bool:
    """Whether a parameter of all experts becomes tensors of each, by its number."""
    numbers = [int(found[2]) for name in own if (found := EXPERT.search(name))]
    return len(numbers) == len(own) and set(numbers) == set(range(floats.shape[0]))


def _later(name: str, count: int) -> str:
    """The name of a tensor of an expert that comes so many after."""
    return EXPERT.sub(lambda found: f"{found[1]}{int(found[2]) + count}{found[3]}", name)


def _values(value: torch.Tensor) -> torch.Tensor:
    return value.dequantized() if isinstance(value, Dequantized) else value.detach()


def _tidy(path: Path, files: list[str], places: dict[str, Place], variant: str | None, model: Any) -> None:
    """The index of several files; what an earlier save has left there goes."""
    stem = f"model.{variant}" if variant else "model"
    index = path / (f"model.safetensors.index.{variant}.json" if variant else "model.safetensors.index.json")
    for old in path.glob(f"{stem}*.safetensors"):
        if old.name not in files and re.fullmatch(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors", old.name):
            old.unlink()
    if len(files) == 1:
        index.unlink(missing_ok=True)
        return
    about = {
        "metadata": {
            "total_parameters": model.num_parameters(),
            "total_size": sum(place.nbytes for place in places.values()),
        },
        "weight_map": {name: files[place.file] for name, place in sorted(places.items())},
    }
    index.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _settings(model: Any, path: Path, dtype: torch.dtype) -> None:
    """Configuration, generation settings, tokenizer. The weights are floats now, whatever they were."""
    config = copy.deepcopy(model.config)
    config.dtype, config.architectures = str(dtype)[6:], [type(model).__name__]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(path)
    if model.can_generate():
        settings = copy.deepcopy(model.generation_config)
        settings.disable_compile = None  # ktx.skeleton sets it
        settings.save_pretrained(path)
    tokenizer = model.ktx.tokenizer
    if tokenizer is not None and not any((path / name).exists() for name in TOKENIZER):
        tokenizer.save_pretrained(path)
