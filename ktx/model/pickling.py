"""The files that a loaded model's packed weights came from, as pickles of it refer to them, and loading from these once more."""

from __future__ import annotations

import copy
import hashlib
import importlib
import os
import warnings
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ktx.errors import BadFile
from ktx.injection.inject import Plan, Step
from ktx.injection.rules import Rules
from ktx.kernels import cpu
from ktx.kernels.packed_cache import PackedCache, loading
from ktx.loader.build import placement_options, prepare
from ktx.utils.torch_defaults import torch_defaults
from ktx.weights.base import WeightSource

WHOLE = 256 << 20  # bytes up to which a digest is of the whole file
PIECES, PIECE = 256, 64 << 10  # of a larger one: as many pieces spread over it, and its time of change


@dataclass(frozen=True)
class File:
    """A file of weights as it was when the model was loaded."""

    path: str
    size: int
    changed: int  # nanoseconds
    digest: str = ""  # of its content, when a pickle is made

    @classmethod
    def of(cls, path: str) -> File:
        about = os.stat(path)
        return cls(str(Path(path).resolve()), about.st_size, about.st_mtime_ns)

    def now(self, why: str) -> File:
        """The file as it is now. BadFile when it is gone."""
        try:
            return File.of(self.path)
        except OSError as error:
            raise BadFile(f"{self.path}: {why}, and cannot be read: {error.strerror}") from error

    def summed(self) -> File:
        """With the digest of its content."""
        digest = hashlib.sha256(str(self.size).encode())
        with open(self.path, "rb") as file:
            if self.size <= WHOLE:
                while piece := file.read(PIECE):
                    digest.update(piece)
            else:
                digest.update(str(self.changed).encode())
                for i in range(PIECES):
                    file.seek((self.size - PIECE) * i // (PIECES - 1))
                    digest.update(file.read(PIECE))
        return replace(self, digest=digest.hexdigest())


@dataclass(frozen=True)
class Recipe:
    """What a model was prepared by, `ktx.loader.build.prepare` knows the words; `placed` are the arguments of `placed_by`."""

    weights: str
    config: Any
    rules: Rules
    dtype: Any
    kv_dtype: Any
    trust_remote_code: bool
    targets: dict[str, str | None]
    mtp: bool
    placed: tuple[Any, ...]
    cache_dir: str | None

    def prepare(self) -> tuple[nn.Module, Plan, WeightSource]:
        """Model, plan and source anew."""
        with warnings.catch_warnings():  # what is to be said of it was said when it was loaded
            warnings.simplefilter("ignore")
            built, made, source, _ = prepare(
                self.weights,
                self.weights,
                self.rules,
                self.dtype,
                self.kv_dtype,
                None,
                self.trust_remote_code,
                self.targets,
                self.mtp,
                placement_options(*self.placed),
                self.config,
            )
            made.check(source)
        return built, made, source


class Files:
    """Where packed weights come from. A pickle of a model holds one, and refers to it by an operator's name and a number.

    When it is read again it loads what is asked for: all at once for a whole model, otherwise operator by operator. BadFile for a file that is gone
    or has changed since the model was loaded.
    """

    def __init__(self, recipe: Recipe, paths: Iterable[str]):
        self.recipe, self.files = recipe, [File.of(path) for path in sorted(paths)]
        self.names: set[str] = set()  # of operators whose packed weights refer here
        self._begin()

    def _begin(self) -> None:
        self.read_back = False
        self.found: dict[tuple[str, int], cpu.Packed] = {}
        self.prepared: tuple[nn.Module, Plan, WeightSource] | None = None

    def known(self, name: str, made: list[cpu.Packed]) -> list[cpu.Packed]:
        """As ktx.kernels.packed_cache asks: weights that an operator has loaded."""
        for number, packed in enumerate(made):
            packed.origin = self, name, number
            if self.read_back:
                self.found[name, number] = packed
        self.names.add(name.partition("#")[0])
        return made

    def __copy__(self) -> Files:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Files:
        return self

    def __getstate__(self) -> dict[str, Any]:
        files = []
        for file in self.files:
            now = file.now("a pickle of the model refers to it")
            if now != replace(file, digest=""):
                raise BadFile(
                    f"{file.path}: has changed since the model was loaded, a pickle cannot refer to it; load the model again, or"
                    " write it to a folder of its own with model.save_pretrained"
                )
            files.append(file if file.digest else now.summed())
        self.files = files
        return {"recipe": self.recipe, "files": files, "names": self.names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()
        self.read_back = True
        files = []
        for file in self.files:
            now = file.now("the pickled model's weights are in this file")
            if now.size != file.size or now.summed().digest != file.digest:
                raise BadFile(
                    f"{file.path}: has changed since the model was pickled, which refers to it; put back what it was, or load the model"
                    " with ktx.load and pickle it again"
                )
            files.append(replace(now, digest=file.digest))
        self.files = files

    def open(self) -> None:
        """Loads everything, if a pickle is being read."""
        if self.read_back:
            self._load(self.names)

    def close(self) -> None:
        """After a whole model has been read."""
        self.found, self.prepared = {}, None

    def taken(self, name: str, number: int) -> cpu.Packed:
        """Weights of an operator, loaded."""
        key = name, number
        if key not in self.found:
            self._load({name.partition("#")[0]})
        return self.found.pop(key)

    @torch_defaults()
    def _load(self, names: Collection[str]) -> None:
        if self.prepared is None:
            self.prepared = self.recipe.prepare()
        built, made, source = self.prepared
        steps = [step for step in made if step.path in names]
        steps.sort(key=lambda step: min(((spec.file, spec.offset) for spec in step.specs), default=("", 0)))
        store = self._store(made, source) if names is self.names else None

        def one(step: Step) -> None:
            operator: Any = copy.copy(built.get_submodule(step.path))
            with loading(step.path, store, self):
                operator.load(source)
            source.release(step.tensors)

        with ThreadPoolExecutor(cpu.num_threads()) as pool:
            list(pool.map(one, steps))
        if store is not None:
            store.commit()

    def _store(self, made: Plan, source: WeightSource) -> PackedCache | None:
        """The packed weights on disk where they are there, else the memory for all of them is looked for."""
        above = importlib.import_module("ktx.loader.load")  # it stands above this module
        above.check_memory(made)
        if self.recipe.cache_dir is None:
            return None
        store: PackedCache = above.store_of(self.recipe.cache_dir, made, source)
        if not store.found:
            store.abort()
        return store if store.found else None
