"""Classifies a tensor that no module reads, by its name: a parameter of another tensor, an adapter, a bias."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

REMEDY = "use a GGUF file of this model, or the unquantized checkpoint"


@dataclass(frozen=True)
class Verdict:
    """The classification of a tensor that no module reads.

    `reason`: why that it is harmless or rejected ("": unknown tensor). `pattern`: groups tensors of one kind
    ("": the tensor's name).
    """

    reason: str = ""
    rejected: bool = False
    pattern: str = ""


@dataclass(frozen=True)
class Reads:
    """What a model reads from a checkpoint: tensor names, and paths of the modules that read at least one tensor."""

    tensors: Collection[str]
    modules: Collection[str]


COMPANIONS = re.compile(  # matched against the last component of a name
    r"(?:\w+_)?scales?(?:_inv|_2|_max)?|(?:\w+_)?zero(?:s|_points?)?|qzeros|(?:\w+_)?amax|absmax|nested_absmax|"
    r"(?:nested_)?quant_map|bitsandbytes__\w+|SCB|weight_format|"  # bitsandbytes
    r"(?:\w+_)?g_idx|(?:\w+_)?(?:in)?v?perm|q_groups|q_invperm|"  # GPTQ, EXL2
    # packed integers that replace a weight
    r"q?weight_packed|qweight|q_weight|weight_shape|\w+_blocks|W_q|_data|_shift|weight_qdata|"
    # codebooks
    r"codebooks?|codes|(?:res_)?centroids|Qidxs|S[UV]|su[hv]|sv[hv]|trellis|dense_weights|row_offsets|col_vals|"
    r"weight_[gv]|original[01]|lora_(?:magnitude_vector|embedding_[AB])"  # weights factored into two tensors
)
ADAPTERS = re.compile(
    r"\.(lora_(?:[AB]|magnitude_vector|embedding_[AB])|modules_to_save|bone_\w+|oft_\w+|vera_\w+|ia3_l)(?:\.|$)"
)


def check_companion(key: str, reads: Reads, present: Collection[str]) -> Verdict | None:
    """Rejects an unread tensor that changes others: quantization parameters, adapters, biases. None for any other.

    A model that ignored such a tensor would compute with other weights than intended.

    Args:
        key: the tensor's name.
        reads: what the model reads.
        present: names of all tensors in the checkpoint.
    """
    module, _, last = key.rpartition(".")
    if adapter := ADAPTERS.search(key):
        return Verdict(f"{adapter[1]} of an adapter, which must be merged into its model first", rejected=True)
    weight = f"{module}.weight"
    if weight in present and weight not in reads.tensors and module not in reads.modules:
        return None  # the weight that it belongs to is not read either
    if COMPANIONS.fullmatch(last):
        return Verdict(f"which changes the meaning of other weights and is not supported; {REMEDY}", rejected=True)
    biased = key.removesuffix("_bias")
    if last.endswith("bias") and (module in reads.modules or weight in reads.tensors or biased in reads.tensors):
        return Verdict("a bias that its module does not add", rejected=True)
    return None
