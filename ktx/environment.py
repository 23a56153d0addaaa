"""The table of environment variables that ktx reads, and their validation."""

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
    """A KTX_* variable: its type, its default, and its description in Markdown (docs/install.md has the same text)."""

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
            f"{', '.join(f'`{name}`' for name in ISAS if name != 'amxmodel')}: limits the instruction set, never raises"
            " it; `amxmodel` runs the AMX kernels with tiles emulated in software, for tests",
        ),
        Variable("KTX_THREADS", int, 0, "number of worker threads; default: the number of usable physical cores"),
        Variable(
            "KTX_NUMA",
            str,
            "auto",
            "`auto` (default): rows of every matrix are split over the machine's NUMA nodes; `off`; `fake:N` emulates N"
            " NUMA nodes, for tests",
        ),
        Variable(
            "KTX_GPU",
            str,
            "",
            "`fake:N` emulates N GPUs in CPU memory, for plans and tests; their kernels run in Triton's interpreter"
            " (`TRITON_INTERPRET=1`). `split:N` presents the first GPU as N GPUs",
        ),
        Variable(
            "KTX_FUSION",
            str,
            "on",
            "`on` (default): consecutive decoder layers are computed in one kernel call; `off`: layer by layer, with"
            " equal results, to find out whether a problem is in the groups of layers",
        ),
        Variable(
            "KTX_API_KEY", str, "", "API keys of `ktx serve`, separated by spaces; `ktx bench serve` sends the first"
        ),
        Variable("KTX_PEER_PATH", str, "", "folder in which `ktx bench --peer` searches for the peer's library"),
    )
}


ALLOWED = {  # (regular expression, description) of accepted values; variables that are not listed accept any text
    "KTX_ISA": ("|".join(ISAS), ", ".join(ISAS)),
    "KTX_THREADS": (r"0*(\d{1,3}|10[01]\d|102[0-4])", "a number from 1 to 1024, or 0 for the usable cores"),
    "KTX_NUMA": ("auto|off|fake:[1-8]", "auto, off or fake:N with N from 1 to 8"),
    "KTX_FUSION": ("on|off", "on or off"),
    "KTX_GPU": (r"(fake|split):[1-9]\d?", "fake:N or split:N with N from 1 to 99"),
}


def environment(name: str, environ: Mapping[str, str] = os.environ) -> object:
    """The value of a variable in VARIABLES, converted to its type. Raises UsageError for an invalid value."""
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
    """Raises UsageError for an invalid value of a variable in VARIABLES; warns about unknown KTX_* variables."""
    for name in environ:
        if name in VARIABLES:
            environment(name, environ)
        elif name.startswith("KTX_"):
            warnings.warn(f"the environment variable {name} is not known{did_you_mean(name, VARIABLES)}", stacklevel=2)
