"""A GGUF file, or all parts of a split one, as a WeightSource: mapped, never copied, answered by parameter path."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ktx.errors import BadFile
from ktx.utils.fork_handlers import Lock
from ktx.weights.accounting import Reads, Verdict, companion
from ktx.weights.base import QuantizedTensor, TensorSpec, concat_rows
from ktx.weights.gguf_files import ggufs_in
from ktx.weights.gguf_header import Header, architecture, read_header
from ktx.weights.gguf_keys import ROPE_TABLES, key_differences, refuse_architecture, refuse_kind, rope_differences
from ktx.weights.gguf_names import GGUFNames, Recipe, build, means_something

SPLIT = re.compile(r"^(.+)-(\d{5})-of-(\d{5})(\.gguf)$", re.IGNORECASE)
PAGE = mmap.PAGESIZE


class GGUFSource:
    """Reads headers when made; tensors are views of the mapping, so pages come in when they are touched."""

    def __init__(self, path: Path, config: Any):
        self.path = str(path)
        whole = whole_header(path)
        self.metadata, self.tensors = whole.metadata, whole.tensors
        self.arch = architecture(self.metadata, whole.file)
        refuse_kind(self.metadata, whole.file)
        refuse_architecture(self.arch, whole.file, config.model_type)
        self.total_bytes = sum(spec.nbytes for spec in self.tensors.values())
        self.config = config
        self.names = GGUFNames(self.arch, config, self.tensors)
        self._maps: dict[str, mmap.mmap] = {}
        self._lock = Lock()
        self._recipes: dict[str, Recipe | None] = {}

    def __copy__(self) -> GGUFSource:
        return self  # an open file: copies of a plan read the same one

    def __deepcopy__(self, memo: dict[int, Any]) -> GGUFSource:
        return self

    def __reduce__(self) -> Any:
        return type(self), (Path(self.path).absolute(), self.config)  # opened again

    def recipe(self, name: str) -> Recipe | None:
        if name not in self._recipes:
            self._recipes[name] = self.names.recipe(name)
        return self._recipes[name]

    def spec(self, name: str) -> TensorSpec | None:
        """Shape, type and bytes of a parameter; of several file tensors, the type of the largest and the sum of the bytes."""
        recipe = self.recipe(name)
        if recipe is None:
            return None
        largest = max(self.specs(name), key=lambda spec: spec.nbytes)
        total = 0
        for part in recipe.parts:
            spec = self.tensors[part.tensor]
            total += (
                spec.nbytes if part.rows is None else spec.nbytes // spec.shape[-2] * (part.rows.stop - part.rows.start)
            )
        return TensorSpec(name, recipe.shape, largest.qtype, total, largest.file, largest.offset)

    def specs(self, name: str) -> list[TensorSpec]:
        recipe = self.recipe(name)
        return (
            []
            if recipe is None
            else sorted((self.tensors[part.tensor] for part in recipe.parts), key=lambda s: (s.file, s.offset))
        )

    def parts(self, name: str) -> list[QuantizedTensor]:
        """Row-wise parts of a parameter, packed; more than one only when the file keeps them in different tensors."""
        recipe = self.recipe(name)
        if recipe is None:
            raise BadFile(f"{self.path}: no tensor for {name}")
        return build(recipe, self.read)

    def get(self, name: str) -> QuantizedTensor:
        """A parameter as one tensor: packed where that is possible, else dequantised to F32."""
        parts = self.parts(name)
        recipe = self.recipe(name)
        assert recipe is not None
        return concat_rows(parts, recipe.shape)

    def read(self, tensor: str) -> QuantizedTensor:
        """A file tensor as it lies in the file."""
        spec = self.tensors[tensor]
        flat = torch.frombuffer(self._map(spec.file), dtype=torch.uint8, count=spec.nbytes, offset=spec.offset)
        rows = spec.shape[:-1] or (1,)
        data = flat.reshape(*rows, -1) if len(spec.shape) > 1 else flat
        return QuantizedTensor(data, spec.qtype, spec.shape)

    def prefetch(self, names: Iterable[str]) -> None:
        self._advise(names, mmap.MADV_WILLNEED)

    def release(self, names: Iterable[str]) -> None:
        """Gives the pages of these parameters back: they stay in the page cache, not in this process."""
        self._advise(names, mmap.MADV_DONTNEED)

    def behind(self, name: str) -> list[str]:
        return [spec.name for spec in self.specs(name)]

    def flaw(self, name: str) -> str:
        return ""

    def judge(self, key: str, reads: Reads) -> Verdict:
        """Layers past the model's (MTP) and tables that llama.cpp computes are left out rightly."""
        if why := _beside_the_model(key, int(self.config.num_hidden_layers)):
            return Verdict(why)
        if found := companion(key, reads, self.tensors):
            return found
        if key.endswith("attn_kv_b.weight") and {key.replace("kv_b", "k_b"), key.replace("kv_b", "v_b")} <= set(
            reads.tensors
        ):
            return Verdict("read as k_b and v_b")
        if means_something(key):
            return Verdict("with which llama.cpp computes and this model does not", refused=True)
        return Verdict()

    def differences(self, config: Any) -> list[str]:
        from ktx.weights.check_config import gguf_mismatches

        tables = {name: partial(self._table, name) for name in ROPE_TABLES if name in self.tensors}
        return [
            *gguf_mismatches(self.metadata, self.arch, self.tensors, config),
            *key_differences(self.metadata, self.arch, config),
            *rope_differences(self.metadata, self.arch, config, tables),
        ]

    def _table(self, tensor: str) -> list[float]:
        return [float(value) for value in self.read(tensor).dequantize().reshape(-1)]

    def _map(self, file: str) -> mmap.mmap:
        with self._lock:
            if file not in self._maps:
                with open(
                    file, "rb"
                ) as handle:  # private and writable: torch wants writable memory, the file stays as it is
                    self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
            return self._maps[file]

    def _advise(self, names: Iterable[str], advice: int) -> None:
        for name in names:
            for spec in self.specs(name):
                start = spec.offset // PAGE * PAGE
                if advice == mmap.MADV_DONTNEED:  # whole pages only: a neighbour may still be read
                    start = (spec.offset + PAGE - 1) // PAGE * PAGE
                length = spec.offset + spec.nbytes - start
                length = length // PAGE * PAGE if advice == mmap.MADV_DONTNEED else length
                if length > 0:
                    self._map(spec.file).madvise(advice, start, length)


def _beside_the_model(name: str, layers: int) -> str:
    block = re.match(r"blk\.(\d+)\.", name)
    if (block is not None and int(block[1]) >= layers) or ".nextn." in name:
        return "behind the model's last layer"
    return "a table that is computed" if name.startswith("rope_") else ""


def whole_header(path: Path) -> Header:
    """Metadata of a model's first file, tensors of all its parts: the first may hold none."""
    headers = [read_header(file) for file in _files(path)]
    return Header(headers[0].file, headers[0].metadata, _merged(headers))


def _files(path: Path) -> list[Path]:
    """The file, or every part of the split model it belongs to; a folder must hold one model."""
    if path.is_dir():
        found = ggufs_in(path)
        firsts = [file for file in found if not (m := SPLIT.match(file.name)) or m[2] == "00001"]
        if len(firsts) > 1:
            raise BadFile(
                f"{path}: holds more than one model: {firsts[0].name} and {firsts[1].name}; name the file to load"
            )
        if not found:
            raise BadFile(f"{path}: holds no GGUF file")
        path = firsts[0] if firsts else found[0]
    match = SPLIT.match(path.name)
    if not match and path.is_symlink() and SPLIT.match(path.resolve().name):
        path = path.resolve()  # a link of another name to a part
        match = SPLIT.match(path.name)
    if not match:
        return [path]
    parts = [path.with_name(f"{match[1]}-{i:05d}-of-{match[3]}{match[4]}") for i in range(1, int(match[3]) + 1)]
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        raise BadFile(f"{path}: {len(missing)} of {len(parts)} parts are missing, the first is {missing[0]}")
    return parts


def _merged(headers: list[Header]) -> dict[str, TensorSpec]:
    tensors: dict[str, TensorSpec] = {}
    for header in headers:
        for name, spec in header.tensors.items():
            if name in tensors:
                raise BadFile(f"{header.file}: tensor {name} is in {tensors[name].file} too")
            tensors[name] = spec
    count = headers[0].metadata.get("split.count", 1)
    if isinstance(count, int) and count > len(headers):
        raise BadFile(
            f"{headers[0].file}: is part of a model in {count} files; keep their names (-00001-of-{count:05d}.gguf)"
        )
    expected = headers[0].metadata.get("split.tensors.count")
    if isinstance(expected, int) and expected != len(tensors):
        raise BadFile(f"{headers[0].file}: its {len(headers)} parts hold {len(tensors)} tensors, not {expected}")
    if not tensors:
        raise BadFile(f"{headers[0].file}: holds no tensors")
    return tensors
