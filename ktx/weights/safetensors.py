"""SafetensorsSource: a Hugging Face checkpoint (file, shards or folder) as a WeightSource.

Modules read F32, F16, BF16 and block-FP8; tensors of other types are only accounted for. The header is parsed here and
not by the safetensors library, because a WeightSource needs offsets into the mapped file, and a damaged or hostile
header must be detected before anything is mapped. Format: safetensors' README.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Callable, Collection, Iterable
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ktx.errors import BadFile
from ktx.quant.types import FP8_BLOCK, QTYPES, QType
from ktx.transformers_compat import checkpoint_renaming
from ktx.utils.deprecation import deprecated_members
from ktx.utils.fork_handlers import ForkSafeLock
from ktx.weights.base import QuantizedTensor, TensorSpec, concat_rows
from ktx.weights.gguf import PAGE
from ktx.weights.hf_conversion import ConvertedTensor, find_converted
from ktx.weights.verdict import Reads, Verdict, check_companion

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DTYPES = ("F32", "F16", "BF16", "F8_E4M3")  # types that modules can read
OTHER_DTYPES = {  # the format's other types -> (elements, bytes) of a block
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), (1, 1)),
    **dict.fromkeys(("I16", "U16"), (1, 2)),
    **dict.fromkeys(("I32", "U32"), (1, 4)),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), (1, 8)),
    **{"F4": (2, 1), "F6_E2M3": (4, 3), "F6_E3M2": (4, 3)},
}
ALL_DTYPES = {name: QTYPES[name] for name in DTYPES} | {
    name: QType(name, -1, *block) for name, block in OTHER_DTYPES.items()
}
MAX_HEADER_BYTES = 100 << 20  # the format's own limit
EXPERT = re.compile(r"^(.+\.experts)\.(gate|up|down)_proj(_bias)?$")
MIXTRAL_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}

MTP = "multi-token prediction"
# Parts of a checkpoint that the text model does not use, with the reason; the first pattern that matches a name counts.
UNUSED_PARTS = tuple(
    (re.compile(rf"(?:^|\.)(?:{names})(?:\.|$)"), reason)
    for names, reason in (
        (r"mtp\w*|nextn\w*", MTP),
        (
            r"visual|vision|vision_\w+|vit|image_\w+|img_\w+|multi_?modal_projector|mm_\w+|mlp1|connector|aligner|"
            r"embed_vision",
            "for images, only text is supported",
        ),
        (r"audio|audio_\w+|embed_audio|speech_\w+|talker|code2wav|token2wav", "for audio, only text is supported"),
    )
)
COMPUTED = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r"(?:^|\.)(?:\w*inv_freq|(?:cos|sin)_cached|rope\.freqs)$", "a computed table"),
        (r"(?:^|[._])(?:attn|attention)\.(?:masked_)?bias$", "a computed mask"),
        (r"(?:^|\.)position_ids$", "computed positions"),
    )
)


@deprecated_members(parts="get_parts")
class SafetensorsSource:
    """Reads the headers on construction; tensors are views of the mapped files."""

    types: Collection[str] = DTYPES  # types that modules can read

    def __init__(self, path: Path, config: PreTrainedConfig):
        """Reads the headers of all files, under the names of the current modeling code.

        Raises BadFile for an invalid header, a missing shard, or a tensor that is in two files.
        """
        self.path, self.config = str(path), config
        self.metadata: dict[str, Any] = {"general.architecture": config.model_type}
        rename, self._converters = self._renaming()
        self.tensors: dict[str, TensorSpec] = {}
        for file in list_shards(path):
            for spec in self._specs_of(file):
                name = rename(spec.name)
                if name in self.tensors:
                    raise BadFile(f"{spec.file}: tensor {spec.name} is in {self.tensors[name].file} too")
                self.tensors[name] = spec
        self.total_bytes = sum(spec.nbytes for spec in self.tensors.values())
        self._maps: dict[str, mmap.mmap] = {}
        self._lock = ForkSafeLock()

    def __copy__(self) -> SafetensorsSource:
        return self  # an open file: copies of a plan read the same one

    def __deepcopy__(self, memo: dict[int, Any]) -> SafetensorsSource:
        return self

    def __reduce__(self) -> Any:
        return type(self), (Path(self.path).absolute(), self.config)  # opened again

    def _renaming(self) -> tuple[Callable[[str], str], list[Any]]:
        return checkpoint_renaming(self.config)

    def _specs_of(self, file: Path) -> list[TensorSpec]:
        return read_safetensors_header(file)

    # ---- names and shapes

    @cached_property
    def converted(self) -> dict[str, ConvertedTensor]:
        """Parameters converted from other tensors; most checkpoints have only experts, which are read directly."""
        return find_converted(self.tensors, self._converters)

    def _sources(self, name: str) -> list[str]:
        """Returns the names of the tensors that a parameter is built from, in row order; empty when there are none."""
        if name in self.tensors:
            return [name]
        expert = EXPERT.match(name)
        if expert:
            return self._expert_sources(expert[1], expert[2], bool(expert[3]))
        # MLA's absorbed k_b and v_b, which checkpoints store as one kv_b
        fused = re.match(r"^(.+\.self_attn)\.([kv])_b_proj\.weight$", name)
        if fused and f"{fused[1]}.kv_b_proj.weight" in self.tensors:
            return [f"{fused[1]}.kv_b_proj.weight"]
        return self.converted[name].sources if name in self.converted else []

    def _expert_sources(self, experts: str, which: str, bias: bool) -> list[str]:
        """Returns the names of the tensors of one projection of a layer's experts (`which`: gate, up or down).

        Checkpoints store it fused for all experts (gate and up together), or as one tensor per expert, in Mixtral's
        files under other names. Biases exist only in fused form.
        """
        fused = ("down_proj" if which == "down" else "gate_up_proj") + ("_bias" if bias else "")
        if f"{experts}.{fused}" in self.tensors:
            return [f"{experts}.{fused}"]
        for key in (f"{which}_proj", MIXTRAL_NAMES[which]):
            names: list[str] = []
            while f"{experts}.{len(names)}.{key}.weight" in self.tensors:
                names.append(f"{experts}.{len(names)}.{key}.weight")
            if names and not bias:
                return names
        return []

    def specs(self, name: str) -> list[TensorSpec]:
        """Returns the stored tensors that the parameter is built from, in file order."""
        return sorted(
            (self.tensors[source] for source in self._sources(name)), key=lambda spec: (spec.file, spec.offset)
        )

    def spec(self, name: str) -> TensorSpec | None:
        """Shape, type and size of a parameter, as modules request it; None when the checkpoint does not contain it."""
        sources = self._sources(name)
        if not sources:
            return None
        first = self.tensors[sources[0]]
        shape = self._shape_of(name, sources)
        nbytes = prod(shape) // first.qtype.block * first.qtype.nbytes
        return TensorSpec(name, shape, first.qtype, nbytes, first.file, first.offset)

    def _shape_of(self, name: str, sources: list[str]) -> tuple[int, ...]:
        """Returns the shape in which modules request a parameter, from the shapes of its tensors.

        No weights are read, because plans need the shapes before that. The cases are those of `get_parts`.
        """
        if self._is_converted(name, sources):
            empty = partial(torch.empty, device="meta")
            return tuple(self.converted[name].values(lambda key: empty(self.tensors[key].shape), self.config).shape)
        shape = self.tensors[sources[0]].shape
        if sources == [name] and not self._transposed(name):
            return shape
        if re.search(r"\.k_b_proj\.weight$", name):
            return (self.config.num_attention_heads, self.config.kv_lora_rank, self.config.qk_nope_head_dim)
        if re.search(r"\.v_b_proj\.weight$", name):
            return (self.config.num_attention_heads, self.config.v_head_dim, self.config.kv_lora_rank)
        if EXPERT.match(name) and ".gate_up_proj" in sources[0]:
            if sources[0].endswith("_bias"):
                return (shape[0], shape[1] // 2)
            return (
                (shape[0], shape[2] // 2, shape[1]) if self._transposed(name) else (shape[0], shape[1] // 2, shape[2])
            )
        if self._transposed(name):
            return (shape[0], shape[2], shape[1])
        return (len(sources), *shape)

    def _transposed(self, name: str) -> bool:
        """Whether stored matrices are transposed.

        gpt-oss's experts are [experts, columns, rows], with gate and up interleaved.
        """
        return self.config.model_type == "gpt_oss" and EXPERT.match(name) is not None and not name.endswith("_bias")

    def _is_converted(self, name: str, sources: list[str]) -> bool:
        return sources != [name] and "converted" in self.__dict__ and name in self.converted and not EXPERT.match(name)

    # ---- values

    def get_parts(self, name: str) -> list[QuantizedTensor]:
        """Returns a parameter as blocks of rows, from whichever tensors the checkpoint stores it in.

        Tensors stored per expert are one part per expert.

        Raises BadFile when the checkpoint has no tensor for it.
        """
        sources = self._sources(name)
        if not sources:
            raise BadFile(f"{self.path}: no tensor for {name}")
        if sources == [name] and not EXPERT.match(name):
            return [self.read(name)]
        if self._is_converted(name, sources):
            values = self.converted[name].values(lambda key: self.read(key).dequantize(), self.config)
            return [_as_type(values, self.read(sources[0]))]
        if ".self_attn." in name:
            return [self._from_kv_b(name, sources[0])]
        if re.search(r"\.experts\.\d+\.", sources[0]):
            return [self.read(source) for source in sources]
        return [self._from_fused(name, sources[0])]

    def get(self, name: str) -> QuantizedTensor:
        """Returns the parameter as one tensor; raises BadFile when it is missing or damaged."""
        parts = self.get_parts(name)
        return concat_rows(parts, self._shape_of(name, self._sources(name)))

    def _from_kv_b(self, name: str, source: str) -> QuantizedTensor:
        """Takes MLA's absorbed k_b [heads, rank, nope] or v_b [heads, value, rank] from the checkpoint's kv_b_proj."""
        c = self.config
        heads, rank, nope, value = c.num_attention_heads, c.kv_lora_rank, c.qk_nope_head_dim, c.v_head_dim
        kv_b = self.read(source)
        if name.endswith(".k_b_proj.weight"):
            values = kv_b.dequantize().reshape(heads, nope + value, rank)[:, :nope]
            return QuantizedTensor.from_float(values.transpose(1, 2))
        rows = torch.arange(heads * (nope + value)).reshape(heads, -1)[:, nope:].reshape(-1)
        return kv_b.rows(rows).reshape(heads, value, rank)

    def _from_fused(self, name: str, source: str) -> QuantizedTensor:
        """Takes one projection of all experts from a fused tensor: gate is its first half of rows, up the second.

        gpt-oss stores [experts, columns, rows] with gate and up interleaved, so its values are dequantized and
        reordered.
        """
        fused, which = self.read(source), EXPERT.match(name)[2]  # type: ignore[index]
        bias = source.endswith("_bias")
        if self.config.model_type == "gpt_oss":
            values = fused.dequantize()
            values = values if bias else values.transpose(1, 2)
            if which != "down":
                values = values[:, (0 if which == "gate" else 1) :: 2]
            return _as_type(values, fused)
        if which == "down":
            return fused
        half = fused.shape[1] // 2
        return fused.rows(slice(0, half) if which == "gate" else slice(half, 2 * half))

    def read(self, name: str) -> QuantizedTensor:
        """A checkpoint tensor by its key in `tensors`, with its FP8 scales."""
        spec = self.tensors[name]
        flat = torch.frombuffer(self._map(spec.file), dtype=torch.uint8, count=spec.nbytes, offset=spec.offset)
        data = flat.reshape(*spec.shape[:-1], -1) if len(spec.shape) > 1 else flat
        return QuantizedTensor(data, spec.qtype, spec.shape, self._scale(name, spec))

    def _scale(self, name: str, spec: TensorSpec) -> torch.Tensor | None:
        """The scales of an FP8 tensor, one per 128 x 128 weights; None for other types. Raises BadFile if wrong."""
        if spec.qtype.name != "F8_E4M3":
            return None
        if problem := self._scale_flaw(name, spec):
            raise BadFile(f"{spec.file}: {name} {problem}")
        return self.read(scale_name(name)).dequantize()

    def _scale_flaw(self, name: str, spec: TensorSpec) -> str:
        """The problem with the scales of an FP8 tensor, as text that follows its name; empty when there is none."""
        key, supported = scale_name(name), f"ktx reads F8_E4M3 with one scale per {FP8_BLOCK} x {FP8_BLOCK} weights"
        if key not in self.tensors:
            return f"is F8_E4M3 but {key} is missing; {supported}"
        found, blocks = self.tensors[key], (*spec.shape[:-2], *(-(-size // FP8_BLOCK) for size in spec.shape[-2:]))
        if len(spec.shape) < 2 or found.shape != blocks:
            return f"is {_format_shape(spec.shape)} of F8_E4M3, but {key} is {_format_shape(found.shape)}; {supported}"
        return "" if found.qtype.name in ("F32", "F16", "BF16") else f"has {key} of {found.qtype}; {supported}, a float"

    def prefetch(self, names: Iterable[str]) -> None:
        """Asks the system to read the parameters' pages ahead."""
        for name in names:
            for spec in self.specs(name):
                start = spec.offset // PAGE * PAGE
                self._map(spec.file).madvise(mmap.MADV_WILLNEED, start, spec.offset + spec.nbytes - start)

    def release(self, names: Iterable[str]) -> None:
        """Unmaps the parameters' complete pages from this process; a tensor's neighbors may still be read."""
        for name in names:
            for spec in self.specs(name):
                start = (spec.offset + PAGE - 1) // PAGE * PAGE
                length = (spec.offset + spec.nbytes - start) // PAGE * PAGE
                if length > 0:
                    self._map(spec.file).madvise(mmap.MADV_DONTNEED, start, length)

    def source_tensors(self, name: str) -> list[str]:
        """Returns the keys that the parameter is built from, with scales that are tensors of their own."""
        sources = self._sources(name)
        return sources + [scale for source in sources if (scale := scale_name(source)) in self.tensors]

    def unreadable_reason(self, name: str) -> str:
        """Why modules cannot read a parameter (its type, or wrong FP8 scales), as text after its name; else empty."""
        for source in self._sources(name):
            spec = self.tensors[source]
            if spec.qtype.name not in self.types:
                return f"is {spec.qtype}; ktx reads {' '.join(self.types)}"
            if problem := self._scale_flaw(source, spec) if spec.qtype.name == "F8_E4M3" else "":
                return problem
        return ""

    def classify_unread(self, key: str, reads: Reads) -> Verdict:
        """Returns whether a tensor that no module reads may be ignored, and the reason.

        Accepted are layers after the model's last one (multi-token prediction), parts for images and audio, and tables
        that are computed. Without this, a model with one unread weight would load and answer wrongly.
        """
        name, layer = self.tensors[key].name, re.match(r"(?:.+?\.)?layers\.(\d+)\.", key)
        if layer and int(layer[1]) >= int(self.config.num_hidden_layers):
            mtp = f"{layer[0]}eh_proj.weight" in self.tensors  # joins hidden state and embedding, in MTP layers only
            reason = MTP if mtp else f"after the {self.config.num_hidden_layers} layers of the configuration"
            return Verdict(reason, pattern=f"{layer[0]}*")
        for pattern, reason in UNUSED_PARTS:
            if found := pattern.search(name):
                return Verdict(reason, pattern=f"{name[: found.end()].rstrip('.')}.*")
        for pattern, reason in COMPUTED:
            if pattern.search(key):
                return Verdict(reason)
        return check_companion(key, reads, self.tensors) or Verdict()

    def config_mismatches(self, config: PreTrainedConfig) -> list[str]:
        """A line if the embedding's shape contradicts the configuration; all other shapes are checked by the plan."""
        spec = self.tensors.get("model.embed_tokens.weight")
        if spec is not None and spec.shape != (config.vocab_size, config.hidden_size):
            return [
                f"embeddings: {spec.shape} in the file, ({config.vocab_size}, {config.hidden_size}) in the "
                "configuration"
            ]
        return []

    def _map(self, file: str) -> mmap.mmap:
        with self._lock:
            if file not in self._maps:
                with open(file, "rb") as handle:
                    self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
            return self._maps[file]


def scale_name(name: str) -> str:
    """The name of the tensor with the block scales of tensor `name`, in DeepSeek's convention."""
    return f"{name}_scale_inv"


def _format_shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"


def _as_type(values: torch.Tensor, like: QuantizedTensor) -> QuantizedTensor:
    """Converts values to the type of `like` if it is a plain float type, else to F32."""
    if like.qtype is QTYPES["F32"] or like.scale is not None:
        return QuantizedTensor.from_float(values)
    return QuantizedTensor(like.qtype.quantize(values.contiguous()), like.qtype, tuple(values.shape))


def list_shards(path: Path) -> list[Path]:
    """Returns the files of a checkpoint: a folder, an index of shards, or a single file.

    Raises BadFile for an invalid index, a missing shard, or one outside the index's folder.
    """
    if path.is_dir():
        indices = sorted(path.glob("*.safetensors.index.json"))
        if not indices:
            return sorted(path.glob("*.safetensors"))
        path = indices[0]
    if path.suffix != ".json":
        return [path]
    try:
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise BadFile(f"{path}: is not a safetensors index: expected a JSON object with a weight_map") from error
    files = [path.parent / str(name) for name in names]
    for file in files:
        if file.resolve().parent != path.parent.resolve() and not file.is_symlink():
            raise BadFile(f"{path}: lists the shard {file.name!r}, which is outside the index's folder")
        if not file.exists():
            raise BadFile(
                f"{path}: the shard {file.name} is missing ({sum(not f.exists() for f in files)} of {len(files)} are)"
            )
    return files


def read_safetensors_header(path: Path) -> list[TensorSpec]:
    """The tensors of one file. Raises BadFile when its header is invalid."""
    raw, size = read_header_bytes(path)
    return parse_safetensors_header(raw, str(path), size)


def read_header_bytes(path: Path) -> tuple[bytes, int]:
    """Returns a file's header bytes and the file's size in bytes; checks the claimed length before it allocates.

    Raises BadFile for a truncated file or another format.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise BadFile(
                    f"{path}: is not a safetensors file, or is truncated: its header claims {length} of {size} bytes"
                )
            raw = file.read(length)
    except OSError as error:
        raise BadFile(f"{path}: cannot be read: {error.strerror}") from error
    return raw, size


def parse_safetensors_header(raw: bytes, path: str, size: int) -> list[TensorSpec]:
    """The tensors in a header; `size` is the size of the file in bytes. Raises BadFile when the header is invalid."""
    try:
        header = json.loads(raw, object_pairs_hook=_reject_duplicates)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path}: its safetensors header is damaged: {str(error)[:100]}") from error
    if not isinstance(header, dict):
        raise BadFile(f"{path}: its safetensors header is not a JSON object")
    start = 8 + len(raw)
    return [_parse_entry(path, name, entry, start, size) for name, entry in header.items() if name != "__metadata__"]


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _parse_entry(path: str, name: str, entry: Any, data_start: int, size: int) -> TensorSpec:
    """Validates one header entry, because a damaged file may claim any numbers, and returns the tensor's spec.

    `data_start` is the offset of the data section, `size` the file's size, in bytes.
    """
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("shape"), list)
        or not isinstance(entry.get("data_offsets"), list)
    ):
        raise BadFile(f"{path}: tensor {name} has no dtype, shape and data_offsets")
    sizes = [*entry["shape"], *entry["data_offsets"]]
    if (
        len(entry["data_offsets"]) != 2
        or not all(type(n) is int and 0 <= n < 1 << 62 for n in sizes)
        or len(entry["shape"]) > 8
    ):
        raise BadFile(
            f"{path}: tensor {name} has shape {entry['shape']} and data_offsets {entry['data_offsets']}"[:300]
        )
    qtype = ALL_DTYPES.get(str(entry.get("dtype")))
    if qtype is None:
        raise BadFile(
            f"{path}: tensor {name} has dtype {str(entry.get('dtype'))[:40]!r}, which the format does not have"
        )
    shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
    if (end - start) * qtype.block != prod(shape) * qtype.nbytes or data_start + end > size:
        raise BadFile(
            f"{path}: tensor {name} {shape} of {qtype} does not fit bytes {start} to {end} of {size - data_start}: "
            "truncated?"
        )
    return TensorSpec(name, shape, qtype, end - start, path, data_start + start)
