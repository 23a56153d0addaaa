"""LoRA adapters as llama.cpp reads them (convert_lora_to_gguf.py writes them): a GGUF file with `NAME.lora_a` and `NAME.lora_b` for tensors of a model's file.

W' = W + s B A with s = adapter.lora.alpha / r, or 1 where alpha is 0 or not there; r is each tensor's own. What a model's converter does to rows and columns of W it does to those of
B and A, so the recipes of a model's file (ktx.weights.gguf_names) undo it here too. Halves of an embedding are stored with a token's numbers in a row.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ktx.errors import BadFile, UsageError
from ktx.quant.types import QTYPES
from ktx.weights.base import QuantizedTensor, TensorSpec
from ktx.weights.gguf_header import Header, architecture, parse_header
from ktx.weights.gguf_keys import ARCHITECTURES
from ktx.weights.gguf_names import GGUFNames, Recipe
from ktx.weights.lora import MERGED, Adapter, AdapterFile, LowRank, Wish

HALF = re.compile(r"(?P<of>.+)\.lora_(?P<half>[ab])")
LOOKUP = "token_embd.weight"
FOLDER = "give the folder of PEFT's that it was made from"


@dataclass(frozen=True)
class GGUFAdapter:
    """What a file holds, by the tensor of the model's file that it is added to: what module that is, a configuration says."""

    adapter: Adapter
    arch: str
    matrices: Mapping[str, LowRank]

    def named(self, config: Any, weights: Mapping[str, tuple[str, str]]) -> AdapterFile:
        """The same by module path. `weights`: parameter paths as files are asked for them, each with its module's path and, of stacked experts, the projection.

        BadFile for an adapter of another model, UsageError for a tensor that belongs to none of the weights.
        """
        self._check(config)
        specs = {name: TensorSpec(name, one.shape, QTYPES["F32"], 0, "", 0) for name, one in self.matrices.items()}
        names, read = GGUFNames(self.arch, config, specs), set[str]()
        found: dict[str, list[LowRank]] = {}
        for weight, (path, projection) in weights.items():
            try:
                recipe = names.recipe(weight)
                if recipe is None:
                    continue
                one = self._cooked(recipe)
                fits = one.shape == recipe.shape
            except (ValueError, RuntimeError, IndexError):  # recipes presuppose a model's shapes
                fits = False
            if not fits:
                raise BadFile(
                    f"adapter {self.adapter.path}: what it adds to {weight} is not of this model's shape: it was trained on another one"
                )
            assert recipe is not None
            read |= {part.tensor for part in recipe.parts}
            found.setdefault(path, []).append(replace(one, projection=projection))
        self._check_read(specs.keys() - read, int(config.num_hidden_layers))
        return AdapterFile(self.adapter, found, {})

    def _check(self, config: Any) -> None:
        """BadFile for an adapter of another architecture than the model's."""
        where, model_type = self.adapter.path, config.model_type
        if self.arch not in ARCHITECTURES and model_type not in {one for of in ARCHITECTURES.values() for one in of}:
            raise BadFile(
                f"adapter {where}: general.architecture is {self.arch!r}, whose GGUF files ktx does not read; {FOLDER}"
            )
        if model_type not in ARCHITECTURES.get(self.arch, ()):
            raise BadFile(
                f"adapter {where}: general.architecture is {self.arch!r}, the model is a {model_type}: it was trained on another one"
            )

    def _check_read(self, left: Collection[str], layers: int) -> None:
        """UsageError for tensors that nothing was made of, BadFile for those of a layer that there is not."""
        if not left:
            return
        where, first = self.adapter.path, min(left)
        block = re.match(r"blk\.(\d+)\.", first)
        if block and int(block[1]) >= layers:
            raise BadFile(
                f"adapter {where}: it has {first}, the model has {layers} layers: it was trained on another one"
            )
        more = f" (and {len(left) - 1} others)" if len(left) > 1 else ""
        raise UsageError(f"adapter {where}: {first}{more} is no matrix of this model's that takes an adapter; {MERGED}")

    def _cooked(self, recipe: Recipe) -> LowRank:
        """What is added to a parameter that is made by the recipe of the tensors. UsageError for a recipe that computes values."""
        if recipe.value is not None:
            tensors = " and ".join(part.tensor for part in recipe.parts)
            raise UsageError(
                f"adapter {self.adapter.path}: an adapter of {tensors} is none of the model's own matrix; {FOLDER}"
            )
        several = [self.matrices[part.tensor] for part in recipe.parts]
        halves = [
            (one.a, one.b if part.rows is None else one.b[..., part.rows, :])
            for one, part in zip(several, recipe.parts, strict=True)
        ]
        (a, b), *others = halves
        if others:  # rows of one below those of the other, each with a rank of its own
            a, b = torch.cat([a for a, _ in halves]), torch.block_diag(*(b for _, b in halves))
        if recipe.order is not None:
            b = b[recipe.order()]
        if recipe.columns is not None:
            a = a[..., recipe.columns()]
        return LowRank(a.contiguous(), b.contiguous(), several[0].embedding)


def read(wish: Wish) -> GGUFAdapter:
    """Reads a file. BadFile for one that is broken, UsageError for one that holds something else than a plain LoRA."""
    where = str(wish.path)
    try:
        content = wish.path.read_bytes()
    except OSError as error:
        raise BadFile(f"adapter {where}: cannot be read: {error.strerror}") from error
    header = parse_header(content, where)
    factor = _alpha(header)
    digest = hashlib.sha256(content)
    digest.update(repr(wish.scale).encode())
    matrices = _matrices(header, content, factor, wish.scale)
    adapter = Adapter(wish.name, where, wish.scale, digest.digest()[:16])
    return GGUFAdapter(adapter, architecture(header.metadata, where), matrices)


def _alpha(header: Header) -> float:
    """Of an adapter's header. UsageError for anything but a LoRA of one file."""
    where, metadata = header.file, header.metadata
    kind, way = metadata.get("general.type", "model"), metadata.get("adapter.type", "")
    if kind != "adapter":
        raise UsageError(
            f"adapter {where}: general.type is {kind!r}, of an adapter it is 'adapter'; a model goes to --weights"
        )
    if way != "lora":
        raise UsageError(f"adapter {where}: adapter.type is {way!r}, 'lora' is computed; {MERGED}")
    if metadata.get("adapter.alora.invocation_tokens"):
        raise UsageError(
            f"adapter {where}: adapter.alora.invocation_tokens: an adapter that begins inside a prompt is not computed"
        )
    if isinstance(count := metadata.get("split.count", 1), int) and count > 1:
        raise UsageError(f"adapter {where}: is one of {count} files; write it as one (llama-gguf-split --merge)")
    alpha = metadata.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise BadFile(f"adapter {where}: adapter.lora.alpha is {alpha!r}, it must be a number")
    return float(alpha)


def _matrices(header: Header, content: bytes, alpha: float, scale: float) -> dict[str, LowRank]:
    """By the tensor that they are added to."""
    halves: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in header.tensors.items():
        hit = HALF.fullmatch(name)
        if hit is None:
            raise UsageError(f"adapter {header.file}: tensor {name} is no half of a LoRA; {MERGED}")
        halves.setdefault(hit["of"], {})[hit["half"]] = spec
    if not halves:
        raise BadFile(f"adapter {header.file}: holds no tensor")
    found = {}
    for name, both in halves.items():
        if len(both) < 2:
            there = next(iter(both))
            raise BadFile(f"adapter {header.file}: {name} has lora_{there} and no lora_{'ba'['ab'.index(there)]}")
        a, b = (_values(both[half], content) for half in "ab")
        lookup = name == LOOKUP
        if a.ndim == 1:  # of rank 1, in a file whose writer leaves out last dimensions of 1
            a = a[None]
        if lookup and a.ndim == 2:
            a = a.t().contiguous()
        if a.ndim != b.ndim or a.ndim not in (2, 3) or a.shape[:-2] != b.shape[:-2] or a.shape[-2] != b.shape[-1]:
            raise BadFile(
                f"adapter {header.file}: {name} has lora_a {list(both['a'].shape)} and lora_b {list(both['b'].shape)}, which are no pair"
            )
        factor = scale * alpha / b.shape[-1] if alpha else scale
        found[name] = LowRank(a, b * factor, lookup)
    return found


def _values(spec: TensorSpec, content: bytes) -> torch.Tensor:
    """f32, of a tensor's shape."""
    data = torch.frombuffer(bytearray(content[spec.offset : spec.offset + spec.nbytes]), dtype=torch.uint8)
    rows = data.reshape(*spec.shape[:-1], -1)
    return QuantizedTensor(rows, spec.qtype, spec.shape).dequantize()


def found_in(path: Path) -> Path | None:
    """The one GGUF file of a folder that holds no adapter of PEFT's; None where there is none. BadFile where there are several."""
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
    if len(files) > 1:
        raise BadFile(f"adapter {path}: holds {files[0].name} and {files[1].name}; name the file")
    return files[0] if files else None
