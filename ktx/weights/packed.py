"""Checkpoints of packed weights: the format that `model.save_pretrained(folder, packed=True)` writes, and its source.

Such a safetensors file has in its `__metadata__` the keys `ktx.version` and `ktx.types`, a JSON object that maps tensor
names to types. A tensor listed there is U8 and its last dimension is the bytes of a row: ggml blocks as in a GGUF file,
or blocks of ktx's own types (ktx.quant.types). F8_E4M3 has its scales in a separate tensor, as in DeepSeek's
checkpoints. All other tensors are plain floats. Names are those that modules request (ktx.weights.base), with experts
stacked in one tensor per projection; rows of different types are separate tensors, `NAME.part0`, `NAME.part1`, ...
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ktx.errors import BadFile, did_you_mean
from ktx.quant.types import QTYPES
from ktx.weights.base import EXPANDED, QuantizedTensor, TensorSpec
from ktx.weights.safetensors import SafetensorsSource, list_shards, parse_safetensors_header, read_header_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

METHOD = "ktx"  # quant_method in quantization_config
VERSION = 1
PART = re.compile(r"^(.+)\.part(\d+)$")
KV_B = re.compile(r"^(.+\.)kv_b_proj\.weight$")


def packed_metadata(types: dict[str, str]) -> dict[str, str]:
    """`__metadata__` for a file with packed tensors; `types` maps tensor names to type names."""
    return {"format": "pt", "ktx.version": str(VERSION), "ktx.types": json.dumps(types, separators=(",", ":"))}


def quantization_config() -> dict[str, Any]:
    """The `quantization_config` of a packed checkpoint's config.json."""
    return {"quant_method": METHOD, "version": VERSION}


def is_packed_config(config: PreTrainedConfig) -> bool:
    """Whether a model's configuration is of a packed checkpoint."""
    quantization = getattr(config, "quantization_config", None)
    return isinstance(quantization, dict) and quantization.get("quant_method") == METHOD


def part_name(name: str, number: int, count: int) -> str:
    """The tensor name of part `number` of a parameter with `count` parts."""
    return name if count == 1 else f"{name}.part{number}"


def is_packed(path: Path) -> bool:
    """Whether a checkpoint is packed, by the header of its first file."""
    files = list_shards(path)
    return bool(files) and "ktx.version" in _metadata(read_header_bytes(files[0])[0])


def _metadata(raw: bytes) -> dict[str, Any]:
    """A header's `__metadata__`; empty when the header is damaged, which is reported when its tensors are read."""
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return metadata if isinstance(metadata, dict) else {}


def _read_types(raw: bytes, file: Path) -> dict[str, str]:
    """Reads a file's `ktx.types`: tensor name -> type name, without which packed tensors are mere bytes.

    Raises BadFile for a file that is not packed or has another version.
    """
    metadata = _metadata(raw)
    version = metadata.get("ktx.version")
    if version != str(VERSION):
        what = (
            "is not packed, unlike the other files of its checkpoint" if version is None else f"has version {version!r}"
        )
        raise BadFile(
            f"{file}: {what}; this ktx reads packed weights of version {VERSION}: save them again with "
            "save_pretrained(folder, packed=True), or use a newer ktx"
        )
    try:
        types = json.loads(metadata["ktx.types"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadFile(f"{file}: its ktx.types is not a JSON object that maps names to types") from error
    if not isinstance(types, dict):
        raise BadFile(f"{file}: its ktx.types is not a JSON object that maps names to types")
    return types


class PackedSource(SafetensorsSource):
    """A checkpoint of packed weights: matrices of any type, under the names that modules request."""

    types: Collection[str] = QTYPES

    def _renaming(self) -> tuple[Callable[[str], str], list[Any]]:
        return lambda name: name, []

    def _specs_of(self, file: Path) -> list[TensorSpec]:
        """Returns the file's tensors; packed ones, which the header lists as bytes, as matrices of their own type."""
        raw, size = read_header_bytes(file)
        types = _read_types(raw, file)
        found = {spec.name: spec for spec in parse_safetensors_header(raw, str(file), size)}
        for name, type_name in types.items():
            if name not in found:
                raise BadFile(f"{file}: its ktx.types lists {name}, which the file does not contain")
            found[name] = _typed(found[name], str(type_name))
        return list(found.values())

    @cached_property
    def _parts(self) -> dict[str, list[str]]:
        """Tensor names of the parameters that are stored in several tensors, in order."""
        numbered: dict[str, list[tuple[int, str]]] = {}
        for key in self.tensors:
            if match := PART.match(key):
                numbered.setdefault(match[1], []).append((int(match[2]), key))
        return {name: [key for _, key in sorted(parts)] for name, parts in numbered.items()}

    def _sources(self, name: str) -> list[str]:
        """The names of the tensors that a parameter is built from: its parts, or k_b and v_b for kv_b_proj."""
        if name in self.tensors:
            return [name]
        if name in self._parts:
            return self._parts[name]
        if (match := KV_B.match(name)) and f"{match[1]}k_b_proj.weight" in self.tensors:
            return [f"{match[1]}{half}_b_proj.weight" for half in "kv"]
        return super()._sources(name)

    def spec(self, name: str) -> TensorSpec | None:
        """Returns a parameter's shape, type and size, which plans need before any weight is read.

        For one that is stored in several parts: the type of the largest, the sum of their bytes.
        """
        specs = [self.tensors[source] for source in self._sources(name)]
        if len(specs) == 1:
            return super().spec(name)
        if not specs:
            return None
        largest = max(specs, key=lambda spec: spec.nbytes)
        nbytes, shape = sum(spec.nbytes for spec in specs), self._shape_of(name, self._sources(name))
        return TensorSpec(name, shape, largest.qtype, nbytes, largest.file, largest.offset)

    def _shape_of(self, name: str, sources: list[str]) -> tuple[int, ...]:
        """The logical shape of a parameter: stored so, summed over its parts, or for kv_b_proj from k_b and v_b."""
        first = self.tensors[sources[0]].shape
        if sources == [name]:
            return first
        if sources == self._parts.get(name):
            return (sum(self.tensors[source].shape[0] for source in sources), *first[1:])
        if KV_B.match(name):
            # k_b is [heads, rank, nope], v_b [heads, value, rank]: joined they are all elements in `rank` columns
            rows = sum(prod(shape) for shape in (self.tensors[source].shape for source in sources)) // first[1]
            return (rows, first[1])
        return super()._shape_of(name, sources)

    def get_parts(self, name: str) -> list[QuantizedTensor]:
        """A parameter as blocks of rows; kv_b_proj, which the format stores as k_b and v_b, is joined in floats."""
        sources = self._sources(name)
        if sources and sources in ([name], self._parts.get(name)):
            return [self.read(source) for source in sources]
        if KV_B.match(name) and sources:
            k, v = (self.read(source).dequantize() for source in sources)
            return [QuantizedTensor.from_float(torch.cat([k.transpose(1, 2), v], 1).flatten(0, 1))]
        return super().get_parts(name)

    def source_tensors(self, name: str) -> list[str]:
        """Returns the keys that the parameter is built from, with MLA's copy for prefill."""
        found = super().source_tensors(name)
        return found + [f"{key}{EXPANDED}" for key in found if f"{key}{EXPANDED}" in self.tensors]


def _typed(spec: TensorSpec, type_name: str) -> TensorSpec:
    """Returns the spec of a U8 tensor with the type and shape of the weights in it, in place of those of its bytes.

    Raises BadFile for an unknown type, or bytes that are not complete rows of it.
    """
    tensor = f"{spec.file}: tensor {spec.name}"
    if type_name not in QTYPES:
        raise BadFile(
            f"{tensor} has the type {type_name[:40]!r}, which this ktx does not support"
            f"{did_you_mean(type_name, QTYPES)}"
        )
    qtype = QTYPES[type_name]
    if spec.qtype.name != "U8" or len(spec.shape) < 2 or spec.shape[-1] % qtype.nbytes:
        size = " x ".join(map(str, spec.shape))
        raise BadFile(
            f"{tensor} is {size} of {spec.qtype}, not rows of {type_name}, which are bytes (U8) in blocks of "
            f"{qtype.nbytes}"
        )
    shape = (*spec.shape[:-1], spec.shape[-1] // qtype.nbytes * qtype.block)
    return TensorSpec(spec.name, shape, qtype, spec.nbytes, spec.file, spec.offset)
