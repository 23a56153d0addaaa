"""Accounts for every tensor of a checkpoint: a tensor that no module reads is listed by pattern, or rejected.

A tensor is rejected when it changes the meaning of tensors that are read. Each source classifies its own names
(`WeightSource.judge`); the patterns common to all formats are here: parameters of other tensors (scales, zero points,
biases).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ktx.weights.base import WeightSource

MAX_LISTED_PATTERNS = 8  # in one note
REMEDY = "use a GGUF file of this model, or the unquantized checkpoint"


@dataclass(frozen=True)
class Verdict:
    """The classification of a tensor that no module reads.

    `why`: the reason that it is harmless or rejected ("": unknown tensor). `pattern`: groups tensors of one kind
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


@dataclass(frozen=True)
class UnreadTensors:
    """A group of tensors that no module reads, with one pattern and one reason."""

    pattern: str
    count: int
    reason: str
    rejected: bool

    def __str__(self) -> str:
        return f"{self.pattern} ({self.count}){', ' * bool(self.reason)}{self.reason}"


def unread_tensors(source: WeightSource, reads: Reads, ignored: Iterable[str] = ()) -> list[UnreadTensors]:
    """Groups the tensors of `source` that no module reads, rejected groups first.

    Args:
        source: the checkpoint.
        reads: the tensors and modules that read from it.
        ignored: regular expressions of tensor names that the modeling code ignores.
    """
    ignored_patterns = [re.compile(pattern) for pattern in ignored]
    groups: dict[tuple[bool, str, str], list[str]] = {}
    for key in source.tensors:
        if key in reads.tensors:
            continue
        name = source.tensors[key].name
        verdict = source.classify_unread(key, reads)
        harmless = verdict.reason and not verdict.rejected
        if not harmless and any(pattern.search(text) for pattern in ignored_patterns for text in (key, name)):
            verdict = Verdict("ignored by transformers")
        pattern = verdict.pattern or re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        groups.setdefault((not verdict.rejected, pattern, verdict.reason), []).append(name)
    return [
        UnreadTensors(names[0] if len(names) == 1 else pattern, len(names), reason, not accepted)
        for (accepted, pattern, reason), names in sorted(groups.items())
    ]


def summary_line(left: Iterable[UnreadTensors]) -> str:
    """A one-line summary of the accepted groups; empty when there are none."""
    accepted = [group for group in left if not group.rejected]
    count = sum(group.count for group in accepted)
    omitted = (
        f"; and {len(accepted) - MAX_LISTED_PATTERNS} other patterns" if len(accepted) > MAX_LISTED_PATTERNS else ""
    )
    listed = "; ".join(map(str, accepted[:MAX_LISTED_PATTERNS]))
    return f"{count} tensor{'s' * (count != 1)} that no module reads: {listed}{omitted}" if accepted else ""


# ---- tensors that are parameters of others

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
