"""Reads LoRA adapters in llama.cpp's GGUF format, as convert_lora_to_gguf.py writes them.

The file contains `NAME.lora_a` and `NAME.lora_b` for tensors NAME of a model's GGUF file. W' = W + s B A, with
s = adapter.lora.alpha / r, or 1 where alpha is 0 or missing; each tensor has its own r. The converter changes the rows
of B and the columns of A as it changes those of W, so the recipes of model files (ktx.weights.gguf_names) undo it here
too. The matrices of an embedding adapter are stored with one row per token.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ktx.errors import BadFile, UsageError
from ktx.families import GGUF_MODEL_TYPES
from ktx.quant.types import QTYPES
from ktx.weights.base import QuantizedTensor, TensorSpec
from ktx.weights.gguf_header import Header, architecture, parse_header
from ktx.weights.gguf_names import GGUFNames, Recipe
from ktx.weights.lora import MERGE_REMEDY, Adapter, AdapterFile, AdapterSpec, LowRank

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

HALF = re.compile(r"(?P<of>.+)\.lora_(?P<half>[ab])")
EMBEDDING = "token_embd.weight"
USE_PEFT_FOLDER = "pass the PEFT folder that it was converted from"


@dataclass(frozen=True)
class GGUFAdapter:
    """An adapter file's matrices by GGUF tensor name; a model's configuration is needed to map them to modules."""

    adapter: Adapter
    arch: str
    matrices: Mapping[str, LowRank]

    def by_module(self, config: PreTrainedConfig, weights: Mapping[str, tuple[str, str]]) -> AdapterFile:
        """Maps the matrices, which have GGUF tensor names, to the paths of the modules that they adapt.

        The recipes are those that build the weights themselves from the tensors of a GGUF file.

        Args:
            config: the model's configuration.
            weights: parameter path -> (module path, projection of stacked experts or "").

        Raises:
            BadFile: the adapter belongs to another model.
            UsageError: a tensor belongs to none of the weights.
        """
        self._check_architecture(config)
        specs = {name: TensorSpec(name, m.shape, QTYPES["F32"], 0, "", 0) for name, m in self.matrices.items()}
        names, read = GGUFNames(self.arch, config, specs), set[str]()
        found: dict[str, list[LowRank]] = {}
        for weight, (path, projection) in weights.items():
            try:
                recipe = names.recipe(weight)
                if recipe is None:
                    continue
                low_rank = self._build(recipe)
                fits = low_rank.shape == recipe.shape
            except (ValueError, RuntimeError, IndexError):  # recipes assume the model's shapes
                fits = False
            if not fits:
                raise BadFile(
                    f"adapter {self.adapter.path}: its matrices for {weight} do not match this model's shape: it was "
                    "trained on another model"
                )
            assert recipe is not None
            read |= {part.tensor for part in recipe.parts}
            found.setdefault(path, []).append(replace(low_rank, projection=projection))
        self._check_read(specs.keys() - read, int(config.num_hidden_layers))
        return AdapterFile(self.adapter, found, {})

    def _check_architecture(self, config: PreTrainedConfig) -> None:
        """Raises BadFile when the adapter's architecture is not the model's; many architectures share tensor names."""
        path, model_type = self.adapter.path, config.model_type
        if self.arch not in GGUF_MODEL_TYPES and model_type not in {
            t for types in GGUF_MODEL_TYPES.values() for t in types
        }:
            raise BadFile(
                f"adapter {path}: general.architecture is {self.arch!r}, which ktx does not load from GGUF; "
                f"{USE_PEFT_FOLDER}"
            )
        if model_type not in GGUF_MODEL_TYPES.get(self.arch, ()):
            raise BadFile(
                f"adapter {path}: general.architecture is {self.arch!r}, the model is a {model_type}: it was trained "
                "on another model"
            )

    def _check_read(self, unread: Collection[str], num_layers: int) -> None:
        """Raises UsageError for tensors that no module uses, BadFile for tensors of a layer beyond the model's.

        An adapter that is applied in part would answer differently, without notice.
        """
        if not unread:
            return
        path, first = self.adapter.path, min(unread)
        block = re.match(r"blk\.(\d+)\.", first)
        if block and int(block[1]) >= num_layers:
            raise BadFile(
                f"adapter {path}: it contains {first}, but the model has {num_layers} layers: it was trained on "
                "another model"
            )
        more = f" (and {len(unread) - 1} others)" if len(unread) > 1 else ""
        raise UsageError(
            f"adapter {path}: {first}{more} does not match a matrix of this model that supports an adapter;"
            f" {MERGE_REMEDY}"
        )

    def _build(self, recipe: Recipe) -> LowRank:
        """Builds a parameter's low-rank matrices A and B by the recipe that builds the parameter from file tensors.

        Where the recipe reorders rows, the rows of B are reordered; where it reorders columns, those of A.

        Raises UsageError when the recipe computes values, which have no low-rank form.
        """
        if recipe.value is not None:
            tensors = " and ".join(part.tensor for part in recipe.parts)
            raise UsageError(
                f"adapter {self.adapter.path}: an adapter of {tensors} cannot be converted to the model's own matrix; "
                f"{USE_PEFT_FOLDER}"
            )
        sources = [self.matrices[part.tensor] for part in recipe.parts]
        pairs = [
            (m.a, m.b if part.rows is None else m.b[..., part.rows, :])
            for m, part in zip(sources, recipe.parts, strict=True)
        ]
        (a, b), *others = pairs
        if others:  # concatenated rows, each part with its own rank
            a, b = torch.cat([a for a, _ in pairs]), torch.block_diag(*(b for _, b in pairs))
        if recipe.order is not None:
            b = b[recipe.order()]
        if recipe.columns is not None:
            a = a[..., recipe.columns()]
        return LowRank(a.contiguous(), b.contiguous(), sources[0].embedding)


def read_gguf_adapter(requested: AdapterSpec) -> GGUFAdapter:
    """Reads a GGUF adapter.

    Raises:
        BadFile: the file cannot be read or is damaged.
        UsageError: it is not a plain LoRA.
    """
    path = str(requested.path)
    try:
        content = requested.path.read_bytes()
    except OSError as error:
        raise BadFile(f"adapter {path}: cannot be read: {error.strerror}") from error
    header = parse_header(content, path)
    alpha = _read_alpha(header)
    digest = hashlib.sha256(content)
    digest.update(repr(requested.scale).encode())
    matrices = _read_matrices(header, content, alpha, requested.scale)
    adapter = Adapter(requested.name, path, requested.scale, digest.digest()[:16])
    return GGUFAdapter(adapter, architecture(header.metadata, path), matrices)


def _read_alpha(header: Header) -> float:
    """Returns adapter.lora.alpha, 0 when missing, after checks that the file is a supported adapter.

    Raises UsageError for anything but a LoRA in a single file.
    """
    path, metadata = header.file, header.metadata
    kind, adapter_type = metadata.get("general.type", "model"), metadata.get("adapter.type", "")
    if kind != "adapter":
        raise UsageError(f"adapter {path}: general.type is {kind!r}, expected 'adapter'; pass a model to --weights")
    if adapter_type != "lora":
        raise UsageError(f"adapter {path}: adapter.type is {adapter_type!r}, only 'lora' is supported; {MERGE_REMEDY}")
    if metadata.get("adapter.alora.invocation_tokens"):
        raise UsageError(
            f"adapter {path}: adapter.alora.invocation_tokens: an adapter that starts within a prompt is not supported"
        )
    if isinstance(count := metadata.get("split.count", 1), int) and count > 1:
        raise UsageError(f"adapter {path}: is one of {count} files; merge them into one (llama-gguf-split --merge)")
    alpha = metadata.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise BadFile(f"adapter {path}: adapter.lora.alpha is {alpha!r}, it must be a number")
    return float(alpha)


def _read_matrices(header: Header, content: bytes, alpha: float, scale: float) -> dict[str, LowRank]:
    """Pairs each tensor's lora_a and lora_b to low-rank matrices, by GGUF tensor name.

    The factor alpha / rank * scale is multiplied into B.

    Raises BadFile for a missing or unsuitable half, UsageError for a tensor that is neither lora_a nor lora_b.
    """
    halves: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in header.tensors.items():
        match = HALF.fullmatch(name)
        if match is None:
            raise UsageError(f"adapter {header.file}: tensor {name} is not a lora_a or lora_b; {MERGE_REMEDY}")
        halves.setdefault(match["of"], {})[match["half"]] = spec
    if not halves:
        raise BadFile(f"adapter {header.file}: contains no tensor")
    found = {}
    for name, pair in halves.items():
        if len(pair) < 2:
            present = next(iter(pair))  # "a" or "b"
            raise BadFile(f"adapter {header.file}: {name} has lora_{present} but no lora_{'ba'['ab'.index(present)]}")
        a, b = (_dequantize_entry(pair[half], content) for half in "ab")
        embedding = name == EMBEDDING
        if a.ndim == 1:  # rank 1, from a writer that omits trailing dimensions of 1
            a = a[None]
        if embedding and a.ndim == 2:
            a = a.t().contiguous()
        if a.ndim != b.ndim or a.ndim not in (2, 3) or a.shape[:-2] != b.shape[:-2] or a.shape[-2] != b.shape[-1]:
            raise BadFile(
                f"adapter {header.file}: {name} has lora_a {list(pair['a'].shape)} and lora_b {list(pair['b'].shape)}, "
                "which do not match"
            )
        factor = scale * alpha / b.shape[-1] if alpha else scale
        found[name] = LowRank(a, b * factor, embedding)
    return found


def _dequantize_entry(spec: TensorSpec, content: bytes) -> torch.Tensor:
    """Returns a tensor of the file, f32 of its shape."""
    data = torch.frombuffer(bytearray(content[spec.offset : spec.offset + spec.nbytes]), dtype=torch.uint8)
    rows = data.reshape(*spec.shape[:-1], -1)
    return QuantizedTensor(rows, spec.qtype, spec.shape).dequantize()


def find_gguf_adapter(path: Path) -> Path | None:
    """The GGUF file in a folder without a PEFT adapter; None when there is none. Raises BadFile for several."""
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
    if len(files) > 1:
        raise BadFile(f"adapter {path}: contains {files[0].name} and {files[1].name}; pass the file to use")
    return files[0] if files else None
