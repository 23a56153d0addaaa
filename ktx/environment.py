"""The environment variables ktx reads, in one table."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from ktx.errors import UsageError, did_you_mean
from ktx.hardware import ISAS


@dataclass(frozen=True)
class Variable:
    """One KTX_* variable: its type, its value when unset, and what it does."""

    name: str
    kind: type
    default: object
    help: str


VARIABLES = {
    variable.name: variable
    for variable in (
        Variable(
            "KTX_ISA",
            str,
            "",
            f"{', '.join(f'`{name}`' for name in ISAS if name != 'amxmodel')}: lowers the instruction set, never raises it; `amxmodel` is AMX's kernels on tiles in software, for tests",
        ),
        Variable("KTX_THREADS", int, 0, "size of the worker team; default the usable physical cores"),
        Variable(
            "KTX_NUMA",
            str,
            "auto",
            "`auto` (default): rows of every matrix are split over the machine's memory nodes; `off`; `fake:N` pretends N nodes, to test",
        ),
        Variable(
            "KTX_GEMM",
            str,
            "exact",
            "`exact` (default) or `fast`: many tokens on weights requantised to a scale for 256 columns (AVX-512); `make cpu-check` prints its error",
        ),
        Variable(
            "KTX_GPU",
            str,
            "",
            "`fake:N` pretends N GPUs in the CPU's memory, for plans and tests; their kernels run in Triton's interpreter (`TRITON_INTERPRET=1`). `split:N` takes the first GPU there is for N",
        ),
        Variable(
            "KTX_API_KEY", str, "", "keys of `ktx serve`, with spaces between; `ktx bench serve` asks with the first"
        ),
        Variable("KTX_PEER_PATH", str, "", "folder in which `ktx bench --peer` finds the peer's library"),
    )
}


ALLOWED = {  # what values match, and that in words; any text where a variable is not named
    "KTX_ISA": ("|".join(ISAS), ", ".join(ISAS)),
    "KTX_THREADS": (r"0*(\d{1,3}|10[01]\d|102[0-4])", "a number from 1 to 1024, or 0 for the usable cores"),
    "KTX_NUMA": ("auto|off|fake:[1-8]", "auto, off or fake:N with N from 1 to 8"),
    "KTX_GEMM": ("exact|fast", "exact or fast"),
    "KTX_GPU": (r"(fake|split):[1-9]\d?", "fake:N or split:N with N from 1 to 99"),
}


def environment(name: str, environ: Mapping[str, str] = os.environ) -> object:
    """The value of a variable of the table; UsageError for one that it cannot have."""
    variable = VARIABLES[name]
    text = environ.get(name, "")
    if not text:
        return variable.default
    if name in ALLOWED and not re.fullmatch(ALLOWED[name][0], text):
        raise UsageError(
            f"{name}={text} is not known: use {ALLOWED[name][1]}{did_you_mean(text, ISAS) if name == 'KTX_ISA' else ''}"
        )
    return variable.kind(text)


def check_environment(environ: Mapping[str, str] = os.environ) -> None:
    """UsageError for a variable of the table with a value that means nothing; a warning for a KTX_* variable that nobody reads: it is misspelt."""
    for name in environ:
        if name in VARIABLES:
            environment(name, environ)
        elif name.startswith("KTX_"):
            warnings.warn(f"the environment variable {name} is not known{did_you_mean(name, VARIABLES)}", stacklevel=2)
