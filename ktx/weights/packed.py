"""Checkpoints of packed weights: what `model.save_pretrained(folder, packed=True)` writes, and the source that reads it.

A safetensors file of this kind says so in its `__metadata__`: `ktx.version`, and `ktx.types`, a JSON object from tensors' names to types. Such a tensor is U8,
its last dimension the bytes of a row: rows of ggml's blocks as in a GGUF file, or of one of our own types (ktx.quant.types). F8_E4M3 has scales beside it, as
DeepSeek's checkpoints do. All other tensors are plain floats. Names are those that modules ask for (ktx.weights.base), experts stacked in one
tensor a projection; rows of different types are tensors of their own, `NAME.part0`, `NAME.part1`, ...
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from ktx.errors import BadFile, did_you_mean
from ktx.quant.types import QTYPES
from ktx.weights.base import EXPANDED, QuantizedTensor, TensorSpec
from ktx.weights.safetensors import SafetensorsSource, header_of, parse_safetensors_header, shards

METHOD = "ktx"  # of a quantization_config
VERSION = 1
PART = re.compile(r"^(.+)\.part(\d+)$")
BOTH = re.compile(r"^(.+\.)kv_b_proj\.weight$")


def about(types: dict[str, str]) -> dict[str, str]:
    """`__metadata__` of a file with tensors of these types."""
    return {"format": "pt", "ktx.version": str(VERSION), "ktx.types": json.dumps(types, separators=(",", ":"))}


def quantization_config() -> dict[str, Any]:
    """What a config.json says of such a checkpoint."""
    return {"quant_method": METHOD, "version": VERSION}


def says_packed(config: Any) -> bool:
    """Whether a model's configuration does."""
    said = getattr(config, "quantization_config", None)
    return isinstance(said, dict) and said.get("quant_method") == METHOD


def part_of(name: str, number: int, count: int) -> str:
    """The name of one of a parameter's parts."""
    return name if count == 1 else f"{name}.part{number}"


def is_packed(path: Path) -> bool:
    """Whether a checkpoint is one of these, by its first file."""
    files = shards(path)
    return bool(files) and "ktx.version" in _metadata(header_of(files[0])[0])


def _metadata(raw: bytes) -> dict[str, Any]:
    """Of a header; nothing where that is damaged, which is said when its tensors are read."""
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    said = found.get("__metadata__") if isinstance(found, dict) else None
    return said if isinstance(said, dict) else {}


def _types(raw: bytes, file: Path) -> dict[str, str]:
    """The types that a file speaks of. BadFile for a file of another kind, or of another version."""
    said = _metadata(raw)
    version = said.get("ktx.version")
    if version != str(VERSION):
        what = "holds no packed weights as its neighbours do" if version is None else f"is of version {version!r}"
        raise BadFile(
            f"{file}: {what}; this ktx reads packed weights of version {VERSION}: write them again with save_pretrained(folder, packed=True), or take a newer ktx"
        )
    try:
        types = json.loads(said["ktx.types"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadFile(f"{file}: its ktx.types are no JSON object from names to types") from error
    if not isinstance(types, dict):
        raise BadFile(f"{file}: its ktx.types are no JSON object from names to types")
    return types


class PackedSource(SafetensorsSource):
    """As a checkpoint of numbers, with matrices of any type under the names that modules ask for."""

    types: Collection[str] = QTYPES

    def _renaming(self) -> tuple[Callable[[str], str], list[Any]]:
        return lambda name: name, []

    def _specs_of(self, file: Path) -> list[TensorSpec]:
        raw, size = header_of(file)
        types = _types(raw, file)
        found = {spec.name: spec for spec in parse_safetensors_header(raw, str(file), size)}
        for name, word in types.items():
            if name not in found:
                raise BadFile(f"{file}: names a type for {name}, which it does not hold")
            found[name] = _typed(found[name], str(word))
        return list(found.values())

    @cached_property
    def _parts(self) -> dict[str, list[str]]:
        """Parameters that are in several tensors."""
        numbered: dict[str, list[tuple[int, str]]] = {}
        for key in self.tensors:
            if found := PART.match(key):
                numbered.setdefault(found[1], []).append((int(found[2]), key))
        return {name: [key for _, key in sorted(parts)] for name, parts in numbered.items()}

    def _sources(self, name: str) -> list[str]:
        if name in self.tensors:
            return [name]
        if name in self._parts:
            return self._parts[name]
        if (both := BOTH.match(name)) and f"{both[1]}k_b_proj.weight" in self.tensors:
            return [f"{both[1]}{half}_b_proj.weight" for half in "kv"]
        return super()._sources(name)

    def spec(self, name: str) -> TensorSpec | None:
        """Of several parts the type of the largest and the sum of the bytes."""
        specs = [self.tensors[source] for source in self._sources(name)]
        if len(specs) == 1:
            return super().spec(name)
        if not specs:
            return None
        largest = max(specs, key=lambda spec: spec.nbytes)
        nbytes, shape = sum(spec.nbytes for spec in specs), self._shape_of(name, self._sources(name))
        return TensorSpec(name, shape, largest.qtype, nbytes, largest.file, largest.offset)

    def _shape_of(self, name: str, sources: list[str]) -> tuple[int, ...]:
        first = self.tensors[sources[0]].shape
        if sources == [name]:
            return first
        if sources == self._parts.get(name):
            return (sum(self.tensors[source].shape[0] for source in sources), *first[1:])
        if BOTH.match(name):
            rows = sum(prod(shape) for shape in (self.tensors[source].shape for source in sources)) // first[1]
            return (rows, first[1])
        return super()._shape_of(name, sources)

    def parts(self, name: str) -> list[QuantizedTensor]:
        sources = self._sources(name)
        if sources and sources in ([name], self._parts.get(name)):
            return [self.read(source) for source in sources]
        if BOTH.match(name) and sources:
            k, v = (self.read(source).dequantize() for source in sources)
            return [QuantizedTensor.of(torch.cat([k.transpose(1, 2), v], 1).flatten(0, 1))]
        return super().parts(name)

    def behind(self, name: str) -> list[str]:
        found = super().behind(name)
        return found + [f"{key}{EXPANDED}" for key in found if f"{key}{EXPANDED}" in self.tensors]


def _typed(spec: TensorSpec, word: str) -> TensorSpec:
    """A tensor of bytes as one of a type. BadFile for a type that is not known, and for bytes that are no rows of it."""
    at = f"{spec.file}: tensor {spec.name}"
    if word not in QTYPES:
        raise BadFile(f"{at} is of the type {word[:40]!r}, which this ktx does not know{did_you_mean(word, QTYPES)}")
    qtype = QTYPES[word]
    if spec.qtype.name != "U8" or len(spec.shape) < 2 or spec.shape[-1] % qtype.nbytes:
        size = " x ".join(map(str, spec.shape))
        raise BadFile(
            f"{at} is {size} of {spec.qtype}, not rows of {word}, which are bytes (U8) in blocks of {qtype.nbytes}"
        )
    shape = (*spec.shape[:-1], spec.shape[-1] // qtype.nbytes * qtype.block)
    return TensorSpec(spec.name, shape, qtype, spec.nbytes, spec.file, spec.offset)
