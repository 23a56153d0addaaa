"""Every tensor of a file is read or accounted for: what no module reads is listed by pattern, or refused where it changes what others mean.

A source judges its own names (`WeightSource.judge`); what formats have in common is here: parameters of other tensors (scales, zero points, biases).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ktx.weights.base import WeightSource

SHOWN = 8  # patterns of a line
REMEDY = "take a GGUF file of this model, or the checkpoint that was not quantised"


@dataclass(frozen=True)
class Verdict:
    """On a tensor that no module reads: why that is right or wrong ("": nobody knows it), and a pattern for many of its kind ("": its name)."""

    why: str = ""
    refused: bool = False
    pattern: str = ""


@dataclass(frozen=True)
class Reads:
    """What a model reads of a file: names of tensors, and paths of its modules that read some."""

    tensors: Collection[str]
    modules: Collection[str]


@dataclass(frozen=True)
class Unread:
    """Tensors that no module reads and that are alike."""

    pattern: str
    count: int
    why: str
    refused: bool

    def __str__(self) -> str:
        return f"{self.pattern} ({self.count}){', ' * bool(self.why)}{self.why}"


def unread(source: WeightSource, reads: Reads, ignored: Iterable[str] = ()) -> list[Unread]:
    """What is left of a source's tensors, the refused first. `ignored`: regular expressions of names that the modeling code leaves out."""
    harmless = [re.compile(pattern) for pattern in ignored]
    alike: dict[tuple[bool, str, str], list[str]] = {}
    for key in source.tensors:
        if key in reads.tensors:
            continue
        name = source.tensors[key].name
        verdict = source.judge(key, reads)
        known = verdict.why and not verdict.refused
        if not known and any(pattern.search(text) for pattern in harmless for text in (key, name)):
            verdict = Verdict("transformers leaves them out")
        pattern = verdict.pattern or re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        alike.setdefault((not verdict.refused, pattern, verdict.why), []).append(name)
    return [
        Unread(names[0] if len(names) == 1 else pattern, len(names), why, not listed)
        for (listed, pattern, why), names in sorted(alike.items())
    ]


def line(left: Iterable[Unread]) -> str:
    """One line on tensors that may be left out; empty when there are none."""
    listed = [entry for entry in left if not entry.refused]
    count = sum(entry.count for entry in listed)
    more = f"; and {len(listed) - SHOWN} other patterns" if len(listed) > SHOWN else ""
    shown = "; ".join(map(str, listed[:SHOWN]))
    return f"{count} tensor{'s' * (count != 1)} that no module reads: {shown}{more}" if listed else ""


# ---- tensors that are parameters of others

COMPANIONS = re.compile(  # against a name's last part
    r"(?:\w+_)?scales?(?:_inv|_2|_max)?|(?:\w+_)?zero(?:s|_points?)?|qzeros|(?:\w+_)?amax|absmax|nested_absmax|"
    r"(?:nested_)?quant_map|bitsandbytes__\w+|SCB|weight_format|"  # bitsandbytes
    r"(?:\w+_)?g_idx|(?:\w+_)?(?:in)?v?perm|q_groups|q_invperm|"  # GPTQ, EXL2
    r"q?weight_packed|qweight|q_weight|weight_shape|\w+_blocks|W_q|_data|_shift|weight_qdata|"  # packed words in place of a weight
    r"codebooks?|codes|(?:res_)?centroids|Qidxs|S[UV]|su[hv]|sv[hv]|trellis|dense_weights|row_offsets|col_vals|"  # code books
    r"weight_[gv]|original[01]|lora_(?:magnitude_vector|embedding_[AB])"  # weights made of two tensors
)
ADAPTERS = re.compile(
    r"\.(lora_(?:[AB]|magnitude_vector|embedding_[AB])|modules_to_save|bone_\w+|oft_\w+|vera_\w+|ia3_l)(?:\.|$)"
)


def companion(key: str, reads: Reads, present: Collection[str]) -> Verdict | None:
    """Refuses a tensor that says how others are to be understood: of a quantisation, an adapter, or a bias; None for any other."""
    module, _, last = key.rpartition(".")
    if adapter := ADAPTERS.search(key):
        return Verdict(f"{adapter[1]} of an adapter, which must be merged into its model first", refused=True)
    weight = f"{module}.weight"
    if weight in present and weight not in reads.tensors and module not in reads.modules:
        return None  # what it belongs to is not read either
    if COMPANIONS.fullmatch(last):
        return Verdict(f"which says what other weights mean, and which ktx does not know; {REMEDY}", refused=True)
    whole = key.removesuffix("_bias")
    if last.endswith("bias") and (module in reads.modules or weight in reads.tensors or whole in reads.tensors):
        return Verdict("a bias that its module does not add", refused=True)
    return None
