"""Pickles of a loaded model: they refer to the weight files, from which the packed weights are loaded again."""

from __future__ import annotations

import copy
import hashlib
import os
import warnings
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ktx.errors import BadFile
from ktx.injection.inject import Plan, Step
from ktx.kernels import cpu
from ktx.kernels.packed_cache import PackedCache, cache_context
from ktx.loader.build import BuildOptions, PlannedModel, prepare_model
from ktx.loader.resources import check_memory, open_packed_cache
from ktx.utils.torch_defaults import torch_defaults
from ktx.weights.base import WeightSource

FULL_DIGEST_BYTES = 256 << 20  # max size of a file that is digested completely
NUM_SAMPLES, SAMPLE_BYTES = 256, 64 << 10  # digested samples of a larger file, in addition to its modification time


@dataclass(frozen=True)
class WeightFile:
    """A weight file as it was when the model was loaded."""

    path: str
    size: int
    mtime_ns: int  # modification time in ns
    digest: str = ""  # of its content; set when the model is pickled

    @classmethod
    def of(cls, path: str) -> WeightFile:
        """Returns the current state of a file."""
        stat = os.stat(path)
        return cls(str(Path(path).resolve()), stat.st_size, stat.st_mtime_ns)

    def current(self, purpose: str) -> WeightFile:
        """Returns the current state of this file.

        `purpose` is part of the message of BadFile, which is raised if the file cannot be read.
        """
        try:
            return WeightFile.of(self.path)
        except OSError as error:
            raise BadFile(f"{self.path}: {purpose}, and cannot be read: {error.strerror}") from error

    def with_digest(self) -> WeightFile:
        """Returns the file with the digest of its content, by which the reader of a pickle notices a changed file.

        Of a large file only samples are digested, with its modification time.
        """
        digest = hashlib.sha256(str(self.size).encode())
        with open(self.path, "rb") as file:
            if self.size <= FULL_DIGEST_BYTES:
                while chunk := file.read(SAMPLE_BYTES):
                    digest.update(chunk)
            else:
                digest.update(str(self.mtime_ns).encode())
                for i in range(NUM_SAMPLES):
                    file.seek((self.size - SAMPLE_BYTES) * i // (NUM_SAMPLES - 1))
                    digest.update(file.read(SAMPLE_BYTES))
        return replace(self, digest=digest.hexdigest())


@dataclass(frozen=True)
class BuildArguments:
    """Arguments of `ktx.loader.build.prepare_model` that build a loaded model again.

    Attributes:
        weights: absolute path of the weight files.
        options: as the model was planned, with its rules, compute type and configuration.
        packed_cache_dir: absolute path of the folder that caches packed weights on disk; None: no such cache.
    """

    weights: str
    options: BuildOptions
    packed_cache_dir: str | None

    @classmethod
    def of(cls, planned: PlannedModel, options: BuildOptions, packed_cache_dir: str | Path | None) -> BuildArguments:
        """Returns the arguments by which an unpickled model is built like this one.

        `options` are those that it was planned with; rules, types and configuration are replaced by the plan's.
        """
        resolved = replace(
            options,
            rules=planned.plan.rules,
            dtype=planned.dtype,
            num_experts_per_tok=None,  # the configuration has it
            config=copy.deepcopy(planned.model.config),
        )
        folder = None if packed_cache_dir is None else str(Path(packed_cache_dir).expanduser().absolute())
        return cls(str(Path(planned.source.path).absolute()), resolved, folder)

    def prepare(self) -> PlannedModel:
        """Plans the model again, to load the weights of a pickle from their files; gives no warnings of loading."""
        with warnings.catch_warnings():  # they were issued when the model was loaded
            warnings.simplefilter("ignore")
            planned = prepare_model(self.weights, self.weights, self.options)
            planned.plan.check(planned.source)
        return planned


class WeightFiles:
    """The weight files of a model, as a pickle refers to them.

    Each packed weight in a pickle refers to this object by its operator's name and a number. When the pickle is read, a
    full model loads all weights at once; otherwise they are loaded operator by operator.

    Raises:
        BadFile: a file is missing or has changed since the model was loaded.
    """

    def __init__(self, recipe: BuildArguments, paths: Iterable[str]):
        self.recipe, self.files = recipe, [WeightFile.of(path) for path in sorted(paths)]
        self.names: set[str] = set()  # operators whose packed weights refer to this object
        self._reset()

    def _reset(self) -> None:
        """Clears the state that belongs to reading a pickle."""
        self.unpickled = False
        self.found: dict[tuple[str, int], cpu.Packed] = {}
        self.prepared: PlannedModel | None = None

    def register(self, name: str, packed_weights: list[cpu.Packed]) -> list[cpu.Packed]:
        """Registers an operator's packed weights (ktx.kernels.packed_cache.Origin); returns them."""
        for number, packed in enumerate(packed_weights):
            packed.origin = self, name, number
            if self.unpickled:
                self.found[name, number] = packed
        self.names.add(name.partition("#")[0])
        return packed_weights

    def __copy__(self) -> WeightFiles:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightFiles:
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Stores digests of the files instead of weights. Raises BadFile if a file changed after it was loaded."""
        files = []
        for file in self.files:
            current = file.current("a pickle of the model refers to it")
            if current != replace(file, digest=""):
                raise BadFile(
                    f"{file.path}: has changed since the model was loaded, so a pickle cannot refer to it;"
                    " load the model again, or write it to its own folder with model.save_pretrained"
                )
            files.append(file if file.digest else current.with_digest())
        self.files = files
        return {"recipe": self.recipe, "files": files, "names": self.names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Checks that the files are those that were pickled; their weights are loaded later.

        Raises BadFile if a file is missing or has changed.
        """
        self.__dict__.update(state)
        self._reset()
        self.unpickled = True
        files = []
        for file in self.files:
            current = file.current("the pickled model's weights are in this file")
            if current.size != file.size or current.with_digest().digest != file.digest:
                raise BadFile(
                    f"{file.path}: has changed since the model was pickled, and the pickle refers to it;"
                    " restore the file, or load the model with ktx.load and pickle it again"
                )
            files.append(replace(current, digest=file.digest))
        self.files = files

    def load_all(self) -> None:
        """Loads the weights of all operators if a pickle is being read."""
        if self.unpickled:
            self._load(self.names)

    def free(self) -> None:
        """Frees the loaded weights after a full model has been read."""
        self.found, self.prepared = {}, None

    def take(self, name: str, number: int) -> cpu.Packed:
        """Returns a packed weight of an operator; loads the operator if necessary."""
        key = name, number
        if key not in self.found:
            self._load({name.partition("#")[0]})
        return self.found.pop(key)

    @torch_defaults()
    def _load(self, names: Collection[str]) -> None:
        """Loads the packed weights of the named operators, each into a copy of the planned operator.

        `WeightFiles.register` receives the weights; `take` hands them to the operators that are being unpickled.
        """
        if self.prepared is None:
            self.prepared = self.recipe.prepare()
        model, plan, source = self.prepared.model, self.prepared.plan, self.prepared.source
        steps = [step for step in plan if step.path in names]
        steps.sort(key=lambda step: min(((spec.file, spec.offset) for spec in step.specs), default=("", 0)))
        # Only a full model is loaded from the packed cache.
        store = self._open_complete_cache(plan, source) if names is self.names else None

        def load_step(step: Step) -> None:
            operator: Any = copy.copy(model.get_submodule(step.path))
            with cache_context(step.path, store, self):
                operator.load(source)
            source.release(step.tensors)

        with ThreadPoolExecutor(cpu.num_threads()) as pool:
            list(pool.map(load_step, steps))
        if store is not None:
            store.commit()

    def _open_complete_cache(self, plan: Plan, source: WeightSource) -> PackedCache | None:
        """Returns the packed cache on disk if an earlier load completed it, else None.

        Raises DoesNotFit, before weights are read, if they need more memory than is free.
        """
        check_memory(plan)
        if self.recipe.packed_cache_dir is None:
            return None
        store: PackedCache = open_packed_cache(self.recipe.packed_cache_dir, plan, source)
        if not store.is_complete:
            store.abort()
        return store if store.is_complete else None
