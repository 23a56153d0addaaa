"""GGUFSource: a GGUF file, or all parts of a split one, as a WeightSource; memory-mapped, never copied."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ktx.errors import BadFile
from ktx.utils.deprecation import deprecated_members
from ktx.utils.fork_handlers import ForkSafeLock
from ktx.weights.base import QuantizedTensor, TensorSpec, concat_rows
from ktx.weights.gguf_files import ggufs_in
from ktx.weights.gguf_header import Header, architecture, read_header
from ktx.weights.gguf_keys import ROPE_TABLES, check_architecture, check_file_type, key_mismatches, rope_mismatches
from ktx.weights.gguf_names import GGUFNames, Recipe, build_parameter, is_known_tensor
from ktx.weights.verdict import Reads, Verdict, check_companion

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SPLIT = re.compile(r"^(.+)-(\d{5})-of-(\d{5})(\.gguf)$", re.IGNORECASE)
PAGE = mmap.PAGESIZE


@deprecated_members(parts="get_parts")
class GGUFSource:
    """Reads the headers on construction; tensors are views of the mapping, so pages are loaded on first access."""

    def __init__(self, path: Path, config: PreTrainedConfig):
        """Reads the headers. Raises BadFile when they are not of a model that ktx loads with this configuration."""
        self.path = str(path)
        header = read_split_header(path)
        self.metadata, self.tensors = header.metadata, header.tensors
        self.arch = architecture(self.metadata, header.file)
        check_file_type(self.metadata, header.file)
        check_architecture(self.arch, header.file, config.model_type)
        self.total_bytes = sum(spec.nbytes for spec in self.tensors.values())
        self.config = config
        self.names = GGUFNames(self.arch, config, self.tensors)
        self._maps: dict[str, mmap.mmap] = {}
        self._lock = ForkSafeLock()
        self._recipes: dict[str, Recipe | None] = {}

    def __copy__(self) -> GGUFSource:
        return self  # copies of a plan share the open file

    def __deepcopy__(self, memo: dict[int, Any]) -> GGUFSource:
        return self

    def __reduce__(self) -> Any:
        return type(self), (Path(self.path).absolute(), self.config)  # the unpickling process opens the file again

    def recipe(self, name: str) -> Recipe | None:
        """The cached recipe for a parameter; None when the file does not have it."""
        if name not in self._recipes:
            self._recipes[name] = self.names.recipe(name)
        return self._recipes[name]

    def spec(self, name: str) -> TensorSpec | None:
        """Returns shape, type and size of a parameter, which plans need before any weight is read.

        For one built from several file tensors: the type of the largest, the sum of their bytes.
        """
        recipe = self.recipe(name)
        if recipe is None:
            return None
        largest = max(self.specs(name), key=lambda spec: spec.nbytes)
        total_bytes = 0
        for part in recipe.parts:
            spec = self.tensors[part.tensor]
            total_bytes += (
                spec.nbytes if part.rows is None else spec.nbytes // spec.shape[-2] * (part.rows.stop - part.rows.start)
            )
        return TensorSpec(name, recipe.shape, largest.qtype, total_bytes, largest.file, largest.offset)

    def specs(self, name: str) -> list[TensorSpec]:
        """Returns the stored tensors that the parameter is built from, in file order."""
        recipe = self.recipe(name)
        return (
            []
            if recipe is None
            else sorted((self.tensors[part.tensor] for part in recipe.parts), key=lambda s: (s.file, s.offset))
        )

    def get_parts(self, name: str) -> list[QuantizedTensor]:
        """A parameter as packed blocks of rows; more than one only when the file stores it in several tensors."""
        recipe = self.recipe(name)
        if recipe is None:
            raise BadFile(f"{self.path}: no tensor for {name}")
        return build_parameter(recipe, self.read)

    def get(self, name: str) -> QuantizedTensor:
        """A parameter as one tensor: packed where possible, else dequantized to F32."""
        parts = self.get_parts(name)
        recipe = self.recipe(name)
        assert recipe is not None
        return concat_rows(parts, recipe.shape)

    def read(self, tensor: str) -> QuantizedTensor:
        """A file tensor by its GGUF name, in its stored format."""
        spec = self.tensors[tensor]
        flat = torch.frombuffer(self._map(spec.file), dtype=torch.uint8, count=spec.nbytes, offset=spec.offset)
        rows = spec.shape[:-1] or (1,)
        data = flat.reshape(*rows, -1) if len(spec.shape) > 1 else flat
        return QuantizedTensor(data, spec.qtype, spec.shape)

    def prefetch(self, names: Iterable[str]) -> None:
        """Asks the kernel to read the parameters' pages ahead."""
        self._advise(names, mmap.MADV_WILLNEED)

    def release(self, names: Iterable[str]) -> None:
        """Unmaps the parameters' pages from this process; they stay in the page cache."""
        self._advise(names, mmap.MADV_DONTNEED)

    def source_tensors(self, name: str) -> list[str]:
        """Returns the names of the file's tensors that the parameter is built from."""
        return [spec.name for spec in self.specs(name)]

    def unreadable_reason(self, name: str) -> str:
        """Returns an empty text: all types of a GGUF file can be read."""
        return ""

    def classify_unread(self, key: str, reads: Reads) -> Verdict:
        """Accepts layers beyond the model's (MTP) and computed tables; rejects tensors that llama.cpp computes with."""
        if reason := _unused_reason(key, int(self.config.num_hidden_layers)):
            return Verdict(reason)
        if found := check_companion(key, reads, self.tensors):
            return found
        if key.endswith("attn_kv_b.weight") and {key.replace("kv_b", "k_b"), key.replace("kv_b", "v_b")} <= set(
            reads.tensors
        ):
            return Verdict("read as k_b and v_b")
        if is_known_tensor(key):
            return Verdict("used by llama.cpp's computation but not by this model's", rejected=True)
        return Verdict()

    def config_mismatches(self, config: PreTrainedConfig) -> list[str]:
        """Lines for each contradiction between the file's metadata and the configuration; empty when they agree."""
        from ktx.weights.check_config import gguf_mismatches

        # readers of the rope tables, by name
        tables = {name: partial(self._float_list, name) for name in ROPE_TABLES if name in self.tensors}
        return [
            *gguf_mismatches(self.metadata, self.arch, self.tensors, config),
            *key_mismatches(self.metadata, self.arch, config),
            *rope_mismatches(self.metadata, self.arch, config, tables),
        ]

    def _float_list(self, tensor: str) -> list[float]:
        return [float(value) for value in self.read(tensor).dequantize().reshape(-1)]

    def _map(self, file: str) -> mmap.mmap:
        with self._lock:
            if file not in self._maps:
                # Private and writable, because torch requires writable memory; the file is never modified.
                with open(file, "rb") as handle:
                    self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
            return self._maps[file]

    def _advise(self, names: Iterable[str], advice: int) -> None:
        """Passes `advice` (MADV_WILLNEED or MADV_DONTNEED) to the kernel for the parameters' pages in the files."""
        for name in names:
            for spec in self.specs(name):
                start = spec.offset // PAGE * PAGE
                # Only pages that lie completely inside the tensor, because its neighbors may still be read.
                if advice == mmap.MADV_DONTNEED:
                    start = (spec.offset + PAGE - 1) // PAGE * PAGE
                length = spec.offset + spec.nbytes - start
                length = length // PAGE * PAGE if advice == mmap.MADV_DONTNEED else length
                if length > 0:
                    self._map(spec.file).madvise(advice, start, length)


def _unused_reason(name: str, num_layers: int) -> str:
    """Why the model does not need a GGUF tensor; empty for any that it may need."""
    block = re.match(r"blk\.(\d+)\.", name)
    if (block is not None and int(block[1]) >= num_layers) or ".nextn." in name:
        return "after the model's last layer"
    return "a computed table" if name.startswith("rope_") else ""


def read_split_header(path: Path) -> Header:
    """Metadata of the first file and tensors of all files of a split model; the first file may have no tensors."""
    headers = [read_header(file) for file in _list_files(path)]
    return Header(headers[0].file, headers[0].metadata, _merge_tensors(headers))


def _list_files(path: Path) -> list[Path]:
    """Returns the file, or all parts of the split model it belongs to; a folder must contain exactly one model."""
    if path.is_dir():
        files = ggufs_in(path)
        firsts = [file for file in files if not (m := SPLIT.match(file.name)) or m[2] == "00001"]
        if len(firsts) > 1:
            raise BadFile(
                f"{path}: contains more than one model: {firsts[0].name} and {firsts[1].name}; pass the file to load"
            )
        if not files:
            raise BadFile(f"{path}: contains no GGUF file")
        path = firsts[0] if firsts else files[0]
    match = SPLIT.match(path.name)
    if not match and path.is_symlink() and SPLIT.match(path.resolve().name):
        path = path.resolve()  # a symbolic link to a part, under another name
        match = SPLIT.match(path.name)
    if not match:
        return [path]
    parts = [path.with_name(f"{match[1]}-{i:05d}-of-{match[3]}{match[4]}") for i in range(1, int(match[3]) + 1)]
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        raise BadFile(f"{path}: {len(missing)} of {len(parts)} parts are missing, the first is {missing[0]}")
    return parts


def _merge_tensors(headers: list[Header]) -> dict[str, TensorSpec]:
    """Returns the tensors of all parts of a split model, by name.

    Raises BadFile when a tensor is in two parts, or the parts are fewer, or have fewer tensors, than the first one
    states.
    """
    tensors: dict[str, TensorSpec] = {}
    for header in headers:
        for name, spec in header.tensors.items():
            if name in tensors:
                raise BadFile(f"{header.file}: tensor {name} is in {tensors[name].file} too")
            tensors[name] = spec
    count = headers[0].metadata.get("split.count", 1)
    if isinstance(count, int) and count > len(headers):
        raise BadFile(
            f"{headers[0].file}: is one of {count} files of a split model; its parts need their original names"
            f" (-00001-of-{count:05d}.gguf)"
        )
    expected = headers[0].metadata.get("split.tensors.count")
    if isinstance(expected, int) and expected != len(tensors):
        raise BadFile(
            f"{headers[0].file}: its {len(headers)} parts contain {len(tensors)} tensors, expected {expected}"
        )
    if not tensors:
        raise BadFile(f"{headers[0].file}: contains no tensors")
    return tensors
