"""Where modules are, apart from what replaces them: the `devices:` map of a rule file, and the options that say the same.

An entry's key is a word of WORDS, a range of layers (`layers 0-29`, `experts 3,5-8`), or a regular expression that is searched in the module
path, as a rule's `match.name` is. The first entry whose key finds a module places it; what lies in the module goes along unless it is placed itself.
Parsing knows no torch and no devices of this machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ktx.errors import UsageError

WORDS = {
    "all": r"^$",  # the model: whatever no other entry places
    "embedding": r"(?:^|\.)embed_tokens$",
    "output": r"^lm_head$",
    "experts": r"(?:^|\.)experts$",
    "shared_experts": r"(?:^|\.)shared_experts?(?:_gate)?$",
}
RANGES = {"layers": r"(?:^|\.)layers\.(?:%s)$", "experts": r"(?:^|\.)layers\.(?:%s)\.(?:.+\.)?experts$"}
LAST = ("output", r"^(?:model\.)?norm$")  # what follows the last layer
DEVICE = re.compile(r"cpu|cuda(?::\d{1,3})?")


@dataclass(frozen=True)
class PlacementEntry:
    """Modules whose path `pattern` finds are on `device`: cpu, cuda (the GPU of the module around it, or the first) or cuda:N.

    For the key `all` there may be several GPUs with commas between them: layers are split among them. `where` begins messages.
    An entry with `experts` places no module: of routed experts on the CPU that it finds, so many of a layer are on the GPU of the block around them.
    """

    key: str
    pattern: re.Pattern[str]
    device: str
    where: str
    asked: bool = False  # by an option: a GPU that is not there is an error, not a warning
    implied: bool = False  # nobody wrote it, so nobody is told that it matched nothing
    experts: int | None = None

    @property
    def several(self) -> list[str]:
        """The devices that layers are split among; none where there is one."""
        return self.device.split(",") if "," in self.device else []


def place(
    key: str, device: str | Sequence[str], where: str = "devices", asked: bool = False, implied: bool = False
) -> PlacementEntry:
    """An entry of a map. UsageError, beginning with `where`, for a key or a device that cannot be meant."""
    text = device if isinstance(device, str) else ",".join(device)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if not DEVICE.fullmatch(name):
            raise UsageError(f"{where}: {name!r} is no device; write cpu, cuda or cuda:N")
    if len(names) > 1:
        if key != "all":
            raise UsageError(f"{where}: {key!r} is on one device; only `all` is split among several")
        if "cpu" in names or "cuda" in names or len(set(names)) < len(names):
            raise UsageError(f"{where}: layers are split among different GPUs, as in cuda:0,cuda:1; found {text!r}")
    return PlacementEntry(key, _pattern(key, where), ",".join(names), where, asked, implied)


def share(key: str, count: object, where: str = "gpu_experts") -> PlacementEntry:
    """An entry for the experts of all layers (`all`), of a range (`layers 3-9`), or of modules that a regular expression finds. UsageError as `place`."""
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise UsageError(f"{where}: must be a number of a layer's experts, 0 or more; found {count!r}")
    word, _, numbers = key.partition(" ")
    key = "experts" if key == "all" else f"experts {numbers}" if word == "layers" and numbers else key
    return PlacementEntry(key, _pattern(key, where), "", where, experts=count)


def streaming(wish: object, where: str = "stream_experts") -> int | None:
    """Tokens from which on experts in memory come to their layer's GPU: 0 for never (off), None where it is measured (auto). UsageError for another word."""
    text = "off" if wish is False else "auto" if wish is None else str(wish).strip().lower()
    if text == "auto":
        return None
    if text == "off" or re.fullmatch(r"[1-9]\d{0,8}", text):
        return 0 if text == "off" else int(text)
    raise UsageError(f"{where}: must be auto, off or a number of tokens, found {wish!r}")


def _pattern(key: str, where: str) -> re.Pattern[str]:
    word, _, numbers = key.partition(" ")
    if word in RANGES and numbers:
        return re.compile(RANGES[word] % "|".join(map(str, _numbers(key, numbers, where))))
    if not key:
        raise UsageError(
            f"{where}: an entry of devices needs a name: a regular expression, or one of {' '.join(WORDS)}"
        )
    if re.search(r"\s", key):
        raise UsageError(
            f"{where}: {key!r} is no name of modules: write one of {' '.join(WORDS)}, {' or '.join(RANGES)} with numbers as in layers 0-29, or a regular expression on paths, which have no spaces"
        )
    try:
        return re.compile(WORDS.get(key, key))
    except re.error as error:
        raise UsageError(f"{where}: {key!r} is no regular expression: {error}") from None


def _numbers(key: str, text: str, where: str) -> list[int]:
    """The layers of "0-2,7"."""
    found: list[int] = []
    for part in text.replace(" ", "").split(","):
        span = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        if span is None or int(span[2] or span[1]) < int(span[1]):
            raise UsageError(f"{where}: {key!r} is no range of layers; write layers 0-29, or layers 0-2,7")
        found += range(int(span[1]), int(span[2] or span[1]) + 1)
    return found


def spans(numbers: Iterable[int]) -> str:
    """Layers as a key names them: 0-2,7."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def arranged(
    file: Sequence[PlacementEntry],
    device: str | Sequence[str] | None = None,
    moe_device: str | None = None,
    shared_device: str | None = None,
    devices: Mapping[str, str | Sequence[str]] | None = None,
    gpu_experts: int | None = None,
) -> list[PlacementEntry]:
    """A file's map with what options say before it. `device` takes the whole map's place, and leaves the routed experts on the CPU unless something else is said of them."""
    found = [place(key, value, f"devices, {key}", asked=True) for key, value in (devices or {}).items()]
    if gpu_experts is not None:
        found.append(share("all", gpu_experts))
    else:
        found += [entry for entry in file if entry.experts is not None]
    file = [entry for entry in file if entry.experts is None]
    if moe_device is not None:
        found.append(place("experts", "cpu" if moe_device == "numa" else moe_device, "moe_device", asked=True))
    if shared_device is not None:
        found.append(place("shared_experts", shared_device, "shared_device", asked=True))
    if device is None:
        return [*found, *file]
    everything = place("all", device, "device", asked=True)
    if everything.device != "cpu" and moe_device is None:
        found.append(place("experts", "cpu", implied=True))
    return [*found, everything]


def split(places: Sequence[PlacementEntry], layers: Sequence[int]) -> list[PlacementEntry]:
    """The map with one GPU in every entry: `layers[i]` is which of the several GPUs layer i is on, in rising order."""
    found: list[PlacementEntry] = []
    for entry in places:
        several = entry.several
        if several:
            for number, device in enumerate(several[1:], 1):
                own = [layer for layer, of in enumerate(layers) if of == number]
                if own:
                    found.append(replace(place(f"layers {spans(own)}", device, entry.where), asked=entry.asked))
            found += [replace(place(key, several[-1], entry.where, implied=True), asked=entry.asked) for key in LAST]
        found.append(replace(entry, device=several[0]) if several else entry)
    return found
