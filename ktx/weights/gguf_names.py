"""Maps parameter paths of the transformers model to GGUF tensors, with the conversion that has to be undone.

Most names come from gguf-py's TensorNameMap. This module adds the names that it lacks, and inverts the changes of
values and order that llama.cpp's converter makes (its `conversion/` folder is the reference).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from ktx.families import FAMILIES
from ktx.weights.base import QuantizedTensor, TensorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """Rows of one file tensor: all, or a slice (of every matrix in a 3-D tensor)."""

    tensor: str
    rows: slice | None = None


@dataclass(frozen=True)
class Recipe:
    """How to build a parameter: concatenate the rows of `parts`, then reorder rows or columns, or apply a function."""

    parts: tuple[Part, ...]
    shape: Shape
    order: Callable[[], torch.Tensor] | None = None  # row i of the result is row order[i] of the parts
    columns: Callable[[], torch.Tensor] | None = None  # column i of the result is column columns[i] of the only part
    value: Callable[[torch.Tensor], torch.Tensor] | None = None  # applied to dequantized parts, reshaped to `shape`


Tensors = Mapping[str, TensorSpec]
LAYER = re.compile(r"^(?:model|language_model|model\.language_model)\.layers\.(\d+)\.(.+)$")


class GGUFNames:
    """Builds recipes for the parameters of one configuration from the tensors of one file."""

    def __init__(self, arch: str, config: PreTrainedConfig, tensors: Tensors):
        self.arch, self.config, self.tensors = arch, config, tensors
        mtp_layers = int(getattr(config, "num_nextn_predict_layers", None) or 0)  # multi-token prediction
        self.name_map = _name_map(arch, max(1, int(config.num_hidden_layers)) + mtp_layers)

    def recipe(self, name: str) -> Recipe | None:
        """Returns how to build the parameter `name` from the file's tensors; None when the file does not contain it.

        SPECIAL_NAMES take precedence over gguf-py's name map, which does not know llama.cpp's changes of values and
        order.
        """
        layer = LAYER.match(name)
        if layer:
            block, rest = f"blk.{layer[1]}.", layer[2]
            for pattern, make_recipe in SPECIAL_NAMES:
                match = pattern.match(rest)
                if match:
                    found = make_recipe(self, block, match)
                    if found is not None:
                        return found
        elif self.arch in PLUS_ONE and name == "model.norm.weight":  # stored as 1 + w
            return self.from_tensor("output_norm.weight", value=lambda w: w - 1)
        return self.from_name_map(name)

    # ---- the common case

    def from_name_map(self, name: str) -> Recipe | None:
        """The recipe for a weight or bias that gguf-py's name map lists."""
        for suffix in (".weight", ".bias"):
            if name.endswith(suffix):
                base = self.name_map.get_name(name.removesuffix(suffix))
                return self.from_tensor(base + suffix) if base else None
        return None

    def from_tensor(self, tensor: str, **options: Any) -> Recipe | None:
        """A recipe of one whole file tensor. `options`: fields of `Recipe`; `shape` defaults to the tensor's."""
        spec = self.tensors.get(tensor)
        return None if spec is None else Recipe((Part(tensor),), options.pop("shape", spec.shape), **options)

    def shape(self, tensor: str) -> Shape:
        """Returns the shape of a tensor of the file."""
        return self.tensors[tensor].shape

    def has(self, *tensors: str) -> bool:
        """Whether the file contains all of these tensors."""
        return all(tensor in self.tensors for tensor in tensors)


@lru_cache(maxsize=8)
def _name_map(arch: str, layers: int) -> Any:
    """gguf-py's map from transformers' parameter names to GGUF's. Raises BadFile for an unknown architecture."""
    import gguf

    by_name = {name: arch_id for arch_id, name in gguf.MODEL_ARCH_NAMES.items()}
    if arch not in by_name:
        from ktx.errors import BadFile, did_you_mean

        raise BadFile(
            f"general.architecture is {arch!r}, which gguf-py does not know{did_you_mean(arch, by_name)}; "
            "a newer gguf package may"
        )
    return gguf.get_tensor_name_map(by_name[arch], layers)


@lru_cache(maxsize=1)
def _known_tensor_names() -> frozenset[str]:
    import gguf

    return frozenset(gguf.TENSOR_NAMES.values())


def is_known_tensor(tensor: str) -> bool:
    """Whether llama.cpp uses a tensor of this name in some architecture (rotary tables of old files are not used)."""
    base = re.sub(r"(?<=^blk\.)\d+(?=\.)", "{bid}", tensor).removesuffix(".weight").removesuffix(".bias")
    return base in _known_tensor_names() and not base.endswith("attn_rot_embd")


# The `_make_...` functions below return the recipe of one kind of parameter, None when the file has no tensor for it.
# Their arguments: the names, the prefix of the layer's tensors ("blk.N."), and the match of the parameter's name.

# ---- attention


# Architectures whose files interleave the two halves of each head in the rows of q and k.
INTERLEAVED_QK = frozenset(family.gguf.arch for family in FAMILIES if family.gguf and family.gguf.interleaved_qk)


def _num_heads(names: GGUFNames, which: str) -> int:
    """The number of heads of "q", "k" or "v"."""
    config = names.config
    heads = int(config.num_attention_heads)
    return heads if which == "q" else int(getattr(config, "num_key_value_heads", None) or heads)


def _head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _deinterleave(rows: int, heads: int) -> torch.Tensor:
    """The row order that undoes llama.cpp's interleaving of the two halves of each head in q and k."""
    return torch.arange(rows).reshape(heads, rows // heads // 2, 2).transpose(1, 2).reshape(-1)


def _make_q_k_or_v(names: GGUFNames, block: str, match: re.Match[str]) -> Recipe | None:
    """The recipe of one of a layer's q, k and v projections: its own tensor, or its rows of a fused one.

    llama.cpp's converter interleaves the two halves of each head in q and k of some families; the recipe undoes that.
    """
    which, suffix = match[1], match[2]
    tensor, fused = f"{block}attn_{which}.{suffix}", f"{block}attn_qkv.{suffix}"
    heads = _num_heads(names, which)
    order: Callable[[], torch.Tensor] | None = None
    if names.has(tensor):
        rows = names.shape(tensor)[0]
        if names.arch not in INTERLEAVED_QK or which == "v":
            return names.from_tensor(tensor)
        if suffix == "bias":
            return names.from_tensor(tensor, value=lambda v: v[_deinterleave(rows, heads)])
        return names.from_tensor(tensor, order=lambda: _deinterleave(rows, heads))
    if not names.has(fused):
        return None
    kv_rows = _num_heads(names, "k") * _head_dim(names.config)
    q_rows = names.shape(fused)[0] - 2 * kv_rows  # not heads * head_dim, because Qwen3-Next's q includes a gate
    start = {"q": 0, "k": q_rows, "v": q_rows + kv_rows}[which]
    rows = q_rows if which == "q" else kv_rows
    if suffix == "bias":
        return Recipe((Part(fused),), (rows,), value=lambda v: v[start : start + rows])
    if names.arch in INTERLEAVED_QK and which != "v":
        order = lambda: _deinterleave(rows, heads)  # noqa: E731
    return Recipe((Part(fused, slice(start, start + rows)),), (rows, names.shape(fused)[1]), order=order)


def _make_qkv(names: GGUFNames, block: str, match: re.Match[str]) -> Recipe | None:
    """The recipe of a fused projection: the fused tensor, or the rows of separate q, k and v."""
    suffix = match[1]
    if names.has(f"{block}attn_qkv.{suffix}"):
        return names.from_tensor(f"{block}attn_qkv.{suffix}")
    return _stack_rows(names, [f"{block}attn_{which}.{suffix}" for which in "qkv"])


def _stack_rows(names: GGUFNames, tensors: list[str]) -> Recipe | None:
    """A recipe that concatenates the rows of matrices (or biases); None when one is missing."""
    if not names.has(*tensors):
        return None
    shapes = [names.shape(tensor) for tensor in tensors]
    rows = sum(shape[0] if len(shape) < 3 else shape[-2] for shape in shapes)
    return Recipe(tuple(Part(tensor) for tensor in tensors), (rows, *shapes[0][1:]))


# ---- MLA


def _mla_dims(config: PreTrainedConfig) -> tuple[int, int, int, int]:
    """(heads, kv_lora_rank, qk_nope_head_dim, v_head_dim)."""
    return (
        int(config.num_attention_heads),
        int(config.kv_lora_rank),
        int(config.qk_nope_head_dim),
        int(config.v_head_dim),
    )


def _make_k_b(names: GGUFNames, block: str, match: re.Match[str]) -> Recipe | None:
    """The keys of MLA's absorbed form, [heads, rank, nope]: stored so, or taken from kv_b and transposed."""
    heads, rank, nope, value = _mla_dims(names.config)
    if names.has(f"{block}attn_k_b.weight"):
        return names.from_tensor(f"{block}attn_k_b.weight", shape=(heads, rank, nope))
    up = lambda kv: kv.reshape(heads, nope + value, rank)[:, :nope].transpose(1, 2)  # noqa: E731
    return names.from_tensor(f"{block}attn_kv_b.weight", shape=(heads, rank, nope), value=up)


def _make_v_b(names: GGUFNames, block: str, match: re.Match[str]) -> Recipe | None:
    """The values of MLA's absorbed form, [heads, value, rank]: stored so, or taken from kv_b."""
    heads, rank, nope, value = _mla_dims(names.config)
    if names.has(f"{block}attn_v_b.weight"):
        return names.from_tensor(f"{block}attn_v_b.weight", shape=(heads, value, rank))
    order = lambda: torch.arange(heads * (nope + value)).reshape(heads, -1)[:, nope:].reshape(-1)  # noqa: E731
    return names.from_tensor(f"{block}attn_kv_b.weight", shape=(heads, value, rank), order=order)


def _make_kv_b(names: GGUFNames, block: str, match: re.Match[str]) -> Recipe | None:
    """MLA's expanded kv_b_proj, [heads * (nope + value), rank]: stored so, or joined from k_b and v_b.

    Newer files store only the absorbed form (k_b transposed, and v_b). transformers' modules and adapters need the
    expanded one, whose rows are each head's keys followed by its values.
    """
    heads, rank, nope, value = _mla_dims(names.config)
    if names.has(f"{block}attn_kv_b.weight"):
        return names.from_tensor(f"{block}attn_kv_b.weight")
    tensors = (f"{block}attn_k_b.weight", f"{block}attn_v_b.weight")
    if not names.has(*tensors):
        return None
    k_size = heads * rank * nope

    def join(flat: torch.Tensor) -> torch.Tensor:
        k, v = flat[:k_size].reshape(heads, rank, nope), flat[k_size:].reshape(heads, value, rank)
        return torch.cat([k.transpose(1, 2), v], 1)

    return Recipe(tuple(Part(tensor) for tensor in tensors), (heads * (nope + value), rank), value=join)


# ---- mixture of experts


def _make_experts(names: GGUFNames, block: str, match: re.Match[str]) -> Recipe | None:
    """The recipe of one projection of all experts, [experts, rows, columns].

    Files store it as one tensor, as half of a fused gate and up, or (before March 2024) as one tensor per expert.
    """
    which = match[1]
    tensor, fused = f"{block}ffn_{which}_exps.weight", f"{block}ffn_gate_up_exps.weight"
    if names.has(tensor):
        return names.from_tensor(tensor)
    if which != "down" and names.has(fused):
        experts, rows, columns = names.shape(fused)
        half = slice(0, rows // 2) if which == "gate" else slice(rows // 2, rows)
        return Recipe((Part(fused, half),), (experts, rows // 2, columns))
    per_expert = [f"{block}ffn_{which}.{e}.weight" for e in range(_num_experts(names.config))]
    if per_expert and names.has(*per_expert):
        return Recipe(tuple(Part(expert) for expert in per_expert), (len(per_expert), *names.shape(per_expert[0])))
    return None


def _num_experts(config: PreTrainedConfig) -> int:
    """The configuration's number of routed experts; 0 when it has none."""
    for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"):
        if getattr(config, key, None):
            return int(getattr(config, key))
    return 0


def _make_expert_bias(names: GGUFNames, block: str, match: re.Match[str]) -> Recipe | None:
    return names.from_tensor(f"{block}ffn_{match[1]}_exps.bias")


def _make_correction_bias(names: GGUFNames, block: str, match: re.Match[str]) -> Recipe | None:
    for tensor in (f"{block}exp_probs_b.bias", f"{block}exp_probs_b"):
        if names.has(tensor):
            experts = names.shape(tensor)[-1]
            return names.from_tensor(tensor, shape=(1, experts) if "moe_statics" in match[0] else (experts,))
    return None


def _make_shared_gate(names: GGUFNames, block: str, match: re.Match[str]) -> Recipe | None:
    tensor = f"{block}ffn_gate_inp_shexp.weight"
    return names.from_tensor(tensor, shape=(1, names.shape(tensor)[-1])) if names.has(tensor) else None


def _make_gate_up(names: GGUFNames, block: str, match: re.Match[str]) -> Recipe | None:
    if names.has(f"{block}ffn_gate.weight", f"{block}ffn_up.weight"):
        return _stack_rows(names, [f"{block}ffn_gate.weight", f"{block}ffn_up.weight"])
    return names.from_tensor(f"{block}ffn_up.weight")  # phi3's ffn_up contains both


# ---- linear attention of Qwen3-Next and Qwen3.5, and their norms stored as 1 + w

# Architectures whose files order value heads by their index within a key head: the first value head of each key head,
# then the second ones, ...; and those that store norm weights as 1 + w.
TILED = tuple(family.gguf.arch for family in FAMILIES if family.gguf and family.gguf.tiled_value_heads)
PLUS_ONE = tuple(family.gguf.arch for family in FAMILIES if family.gguf and family.gguf.norms_plus_one)


def _only_for(
    archs: tuple[str, ...], make_recipe: Callable[[GGUFNames, str, re.Match[str]], Recipe | None]
) -> Callable[..., Recipe | None]:
    """Restricts a recipe function to files of some architectures; for the others it returns None."""
    return lambda names, block, match: make_recipe(names, block, match) if names.arch in archs else None


def _make_norm_minus_one(names: GGUFNames, block: str, match: re.Match[str]) -> Recipe | None:
    """The recipe of a norm that the file stores as 1 + w."""
    base = names.name_map.get_name(f"model.layers.{block[4:-1]}.{match[1]}")
    return names.from_tensor(f"{base}.weight", value=lambda w: w - 1) if base else None


def _make_conv1d(names: GGUFNames, block: str, match: re.Match[str]) -> Recipe | None:
    """The convolution of linear attention, [channels, 1, width]; its channels are ordered like qkv's rows."""
    tensor = f"{block}ssm_conv1d.weight"
    if not names.has(tensor):
        return None
    channels, kernel = names.shape(tensor)
    order = (lambda: _qkv_order(names.config)) if names.arch in TILED else None
    return names.from_tensor(tensor, shape=(channels, 1, kernel), order=order)


def _value_head_order(config: PreTrainedConfig, width: int) -> torch.Tensor:
    """The row order that groups the value heads of a tiled file (`width` rows each) by key head, as the model does."""
    keys, values = int(config.linear_num_key_heads), int(config.linear_num_value_heads)
    return torch.arange(values * width).reshape(values // keys, keys, width).transpose(0, 1).reshape(-1)


def _qkv_order(config: PreTrainedConfig) -> torch.Tensor:
    """Row order of a tiled q, k, v projection: queries and keys unchanged, value heads grouped by key head."""
    qk_rows = 2 * int(config.linear_num_key_heads) * int(config.linear_key_head_dim)
    return torch.cat([torch.arange(qk_rows), qk_rows + _value_head_order(config, int(config.linear_value_head_dim))])


def _make_tiled_rows(names: GGUFNames, block: str, match: re.Match[str]) -> Recipe | None:
    """The recipe of a projection of linear attention whose rows are value heads, or end with them.

    The file has the first value head of each key head, then the second ones, ... (TILED); the model groups value heads
    by key head.
    """
    c = names.config
    tensor, order = {
        "qkv": ("attn_qkv", lambda: _qkv_order(c)),
        "z": ("attn_gate", lambda: _value_head_order(c, int(c.linear_value_head_dim))),
        "a": ("ssm_alpha", lambda: _value_head_order(c, 1)),
        "b": ("ssm_beta", lambda: _value_head_order(c, 1)),
    }[match[1]]
    return names.from_tensor(f"{block}{tensor}.weight", order=order)


def _make_tiled_columns(names: GGUFNames, block: str, match: re.Match[str]) -> Recipe | None:
    c = names.config
    return names.from_tensor(
        f"{block}ssm_out.weight", columns=lambda: _value_head_order(c, int(c.linear_value_head_dim))
    )


def _make_a_log(names: GGUFNames, block: str, match: re.Match[str]) -> Recipe | None:
    order = _value_head_order(names.config, 1) if names.arch in TILED else slice(None)
    return names.from_tensor(f"{block}ssm_a", value=lambda a: torch.log(-a.reshape(-1)[order]))


def _make_dt_bias(names: GGUFNames, block: str, match: re.Match[str]) -> Recipe | None:
    order = _value_head_order(names.config, 1) if names.arch in TILED else slice(None)
    return names.from_tensor(f"{block}ssm_dt.bias", value=lambda dt: dt.reshape(-1)[order])


def _make_qkvz(names: GGUFNames, block: str, match: re.Match[str]) -> Recipe | None:
    """The recipe of Qwen3-Next's fused in_proj_qkvz.

    Files have it fused in the model's order (ssm_in), or as q, k, v and z one after another; the model's rows are
    grouped by key head instead: q, k, v, z of the first head, then of the second, ...
    """
    if names.has(f"{block}ssm_in.weight"):
        return names.from_tensor(f"{block}ssm_in.weight")
    stacked = _stack_rows(names, [f"{block}attn_qkv.weight", f"{block}attn_gate.weight"])
    if stacked is None:
        return None
    c = names.config
    heads, k, v = (
        c.linear_num_key_heads,
        c.linear_key_head_dim,
        c.linear_num_value_heads // c.linear_num_key_heads * c.linear_value_head_dim,
    )

    def order() -> torch.Tensor:  # file: all q, all k, all v, all z; model: q, k, v, z of each head
        blocks, start = [], 0
        for width in (k, k, v, v):
            blocks.append(torch.arange(start, start + heads * width).reshape(heads, width))
            start += heads * width
        return torch.cat(blocks, 1).reshape(-1)

    return Recipe(stacked.parts, stacked.shape, order=order)


SPECIAL_NAMES: list[tuple[re.Pattern[str], Callable[[GGUFNames, str, re.Match[str]], Recipe | None]]] = [
    (re.compile(pattern + "$"), make_recipe)
    for pattern, make_recipe in (
        (r"self_attn\.([qkv])_proj\.(weight|bias)", _make_q_k_or_v),
        (r"self_attn\.qkv_proj\.(weight|bias)", _make_qkv),
        (r"self_attn\.k_b_proj\.weight", _make_k_b),
        (r"self_attn\.v_b_proj\.weight", _make_v_b),
        (r"self_attn\.kv_b_proj\.weight", _make_kv_b),
        (r"self_attn\.sinks", lambda n, b, match: n.from_tensor(f"{b}attn_sinks.weight")),
        (r"(?:mlp|block_sparse_moe|feed_forward)\.experts\.(gate|up|down)_proj", _make_experts),
        (r"(?:mlp|block_sparse_moe|feed_forward)\.experts\.(gate|up|down)_proj_bias", _make_expert_bias),
        (r"(?:mlp|block_sparse_moe).*e_score_correction_bias", _make_correction_bias),
        (
            r"(?:mlp|block_sparse_moe|feed_forward)\.router\.weight",
            lambda n, b, match: n.from_tensor(f"{b}ffn_gate_inp.weight"),
        ),
        (r"mlp\.shared_expert_gate\.weight", _make_shared_gate),
        (r"mlp\.gate_up_proj\.weight", _make_gate_up),
        (r"linear_attn\.dt_bias", _make_dt_bias),
        (r"linear_attn\.A_log", _make_a_log),
        (r"linear_attn\.conv1d\.weight", _make_conv1d),
        (r"linear_attn\.in_proj_qkvz\.weight", _make_qkvz),
        (r"linear_attn\.in_proj_(qkv|z|a|b)\.weight", _only_for(TILED, _make_tiled_rows)),
        (r"linear_attn\.out_proj\.weight", _only_for(TILED, _make_tiled_columns)),
        (
            r"((?:self_attn\.[qk]_norm|input_layernorm|post_attention_layernorm))\.weight",
            _only_for(PLUS_ONE, _make_norm_minus_one),
        ),
    )
]


def build_parameter(recipe: Recipe, read: Callable[[str], QuantizedTensor]) -> list[QuantizedTensor]:
    """Builds a parameter by its recipe: reads the file's tensors with `read` and undoes llama.cpp's conversion.

    Returns one tensor, or several whose rows follow one another, because they may have different types.
    """
    parts = [read(part.tensor) if part.rows is None else read(part.tensor).rows(part.rows) for part in recipe.parts]
    if recipe.value is not None:
        flat = [part.dequantize() for part in parts]
        values = recipe.value(flat[0] if len(flat) == 1 else torch.cat([f.reshape(-1) for f in flat]))
        return [QuantizedTensor.from_float(values.reshape(recipe.shape))]
    if recipe.columns is not None:
        return [_reorder_columns(parts[0], recipe.columns())]
    if recipe.order is not None:
        return [_reorder_rows(parts, recipe)]
    if len(parts) == 1:
        return [parts[0].reshape(*recipe.shape) if parts[0].shape != recipe.shape else parts[0]]
    return parts


def _reorder_rows(parts: list[QuantizedTensor], recipe: Recipe) -> QuantizedTensor:
    """Reorders the rows of concatenated parts: moves packed rows if the parts have one type, else converts to f16."""
    order, columns = recipe.order(), recipe.shape[-1]  # type: ignore[misc]
    if all(part.qtype is parts[0].qtype and part.scale is None for part in parts):
        data = torch.cat([part.data.reshape(-1, part.data.shape[-1]) for part in parts])[order]
        return QuantizedTensor(data.reshape(*recipe.shape[:-1], -1), parts[0].qtype, recipe.shape)
    values = torch.cat([part.dequantize().reshape(-1, columns) for part in parts])[order].reshape(recipe.shape)
    return _to_f16(values)  # packed rows of different types cannot be interleaved; f16 has ten bits of mantissa


def _reorder_columns(part: QuantizedTensor, order: torch.Tensor) -> QuantizedTensor:
    """Reorders the columns of a matrix: moves packed blocks if `order` keeps them intact, else converts to f16.

    A quantized block has common scales, so its columns cannot be separated without dequantizing.
    """
    block = part.qtype.block
    col_blocks = order.reshape(-1, block) if len(order) % block == 0 else order[:0].reshape(0, block)
    if len(col_blocks) and bool(
        (col_blocks - col_blocks[:, :1] == torch.arange(block)).all() and (col_blocks[:, 0] % block == 0).all()
    ):
        data = part.data.reshape(*part.data.shape[:-1], len(col_blocks), part.qtype.nbytes)[
            ..., col_blocks[:, 0] // block, :
        ]
        return QuantizedTensor(data.reshape(part.data.shape), part.qtype, part.shape)
    return _to_f16(part.dequantize()[..., order])


def _to_f16(values: torch.Tensor) -> QuantizedTensor:
    data = values.half().contiguous().view(torch.uint8).reshape(*values.shape[:-1], values.shape[-1] * 2)
    return QuantizedTensor(data, _f16(), tuple(values.shape))


def _f16() -> Any:
    from ktx.quant.types import QTYPES

    return QTYPES["F16"]
