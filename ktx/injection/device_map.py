"""Placement of modules on devices: the `devices:` map of a rule file, and the equivalent options.

A key of the map is one of the names in MODULE_NAMES, a range of layers (`layers 0-29`, `experts 3,5-8`), or a regular
expression that is searched in the module path, as a rule's `match.name` is. The first entry whose key matches a module
places it; its submodules follow unless an entry or a rule places them. Parsing depends neither on torch nor on the
devices of this machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ktx.errors import UsageError

MODULE_NAMES = {
    "all": r"^$",  # the model: every module that no other entry places
    "embedding": r"(?:^|\.)embed_tokens$",
    "output": r"^lm_head$",
    "experts": r"(?:^|\.)experts$",
    "shared_experts": r"(?:^|\.)shared_experts?(?:_gate)?$",
}
LAYER_RANGES = {"layers": r"(?:^|\.)layers\.(?:%s)$", "experts": r"(?:^|\.)layers\.(?:%s)\.(?:.+\.)?experts$"}
AFTER_LAST_LAYER = ("output", r"^(?:model\.)?norm$")  # modules that follow the last layer
DEVICE_PATTERN = re.compile(r"cpu|cuda(?::\d{1,3})?")


@dataclass(frozen=True)
class PlacementEntry:
    """An entry of a device map: modules whose path matches `pattern` are on `device`.

    `device` is cpu, cuda (the enclosing module's GPU, or the first one) or cuda:N. With the key `all` it may be several
    GPUs, separated by commas, among which the layers are split. `where` is the prefix of error messages. If `experts`
    is set, the entry places no module: that many routed experts of each matching CPU layer are on the GPU of the
    enclosing MoE block.
    """

    key: str
    pattern: re.Pattern[str]
    device: str
    where: str
    explicit: bool = False  # set by an option: a missing GPU is an error, not a warning
    implied: bool = False  # written by no user: no warning if it matches no module
    num_gpu_experts: int | None = None

    @property
    def split_devices(self) -> list[str]:
        """The GPUs among which layers are split; empty for a single device."""
        return self.device.split(",") if "," in self.device else []


@dataclass(frozen=True)
class PlacementOptions:
    """Placement options of `ktx.load`, as a user gives them; None: not given.

    Attributes:
        device: cpu, cuda, cuda:N, or several GPUs; replaces a rule file's device map.
        moe_device: cpu, cuda, cuda:N or numa; device of the routed experts.
        shared_expert_device: device of the shared experts.
        devices: device by key, as in a rule file's device map.
        gpu_experts: number of experts per layer on the layer's GPU.
    """

    device: str | Sequence[str] | None = None
    moe_device: str | None = None
    shared_expert_device: str | None = None
    devices: Mapping[str, str | Sequence[str]] | None = None
    gpu_experts: int | None = None


def parse_entry(
    key: str, device: str | Sequence[str], where: str = "devices", *, explicit: bool = False, implied: bool = False
) -> PlacementEntry:
    """Parses an entry of a device map.

    Args:
        key: a name in MODULE_NAMES, a range of layers, or a regular expression.
        device: cpu, cuda, cuda:N, or for `all` several GPUs as a list or separated by commas.
        where: prefix of error messages.
        explicit: whether an option set the entry.
        implied: whether the entry is a default that no user wrote.

    Raises:
        UsageError: the key or the device is invalid.
    """
    device_text = device if isinstance(device, str) else ",".join(device)
    names = [name.strip() for name in device_text.split(",")]
    for name in names:
        if not DEVICE_PATTERN.fullmatch(name):
            raise UsageError(f"{where}: {name!r} is not a device; use cpu, cuda or cuda:N")
    if len(names) > 1:
        if key != "all":
            raise UsageError(f"{where}: {key!r} takes one device; only `all` is split among several")
        if "cpu" in names or "cuda" in names or len(set(names)) < len(names):
            raise UsageError(
                f"{where}: layers are split among different GPUs, for example cuda:0,cuda:1; found {device_text!r}"
            )
    return PlacementEntry(key, _compile_key(key, where), ",".join(names), where, explicit, implied)


def parse_gpu_experts(key: str, count: object, where: str = "gpu_experts") -> PlacementEntry:
    """Parses an entry that puts `count` routed experts per layer on the layer's GPU.

    Args:
        key: `all`, a range of layers (`layers 3-9`), or a regular expression on module paths.
        count: number of experts per layer, 0 or more.
        where: prefix of error messages.

    Raises:
        UsageError: the key or the count is invalid.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise UsageError(f"{where}: must be a number of experts per layer, 0 or more; found {count!r}")
    prefix, _, layer_list = key.partition(" ")
    # The entry matches experts, so a key of layers becomes the key of their experts.
    key = "experts" if key == "all" else f"experts {layer_list}" if prefix == "layers" and layer_list else key
    return PlacementEntry(key, _compile_key(key, where), "", where, num_gpu_experts=count)


def parse_stream_experts(value: object, where: str = "stream_experts_min_tokens") -> int | None:
    """Parses `stream_experts_min_tokens`, the min number of tokens from which the CPU's experts go to the GPU.

    Returns:
        0 for off; None for auto, where the number is measured.

    Raises:
        UsageError: the value is neither auto, off nor a number.
    """
    normalized = "off" if value is False else "auto" if value is None else str(value).strip().lower()
    if normalized == "auto":
        return None
    if normalized == "off" or re.fullmatch(r"[1-9]\d{0,8}", normalized):
        return 0 if normalized == "off" else int(normalized)
    raise UsageError(f"{where}: must be auto, off or a number of tokens, found {value!r}")


def _compile_key(key: str, where: str) -> re.Pattern[str]:
    """Returns the regular expression for the module paths that a key selects. Raises UsageError for an invalid key."""
    prefix, _, layer_list = key.partition(" ")
    if prefix in LAYER_RANGES and layer_list:
        return re.compile(LAYER_RANGES[prefix] % "|".join(map(str, _parse_layers(key, layer_list, where))))
    if not key:
        raise UsageError(
            f"{where}: an entry of devices needs a key: a regular expression, or one of {' '.join(MODULE_NAMES)}"
        )
    if re.search(r"\s", key):
        raise UsageError(
            f"{where}: {key!r} does not name modules: use one of {' '.join(MODULE_NAMES)},"
            f" {' or '.join(LAYER_RANGES)} with layer numbers (layers 0-29), or a regular expression on paths,"
            " which have no spaces"
        )
    try:
        return re.compile(MODULE_NAMES.get(key, key))
    except re.error as error:
        raise UsageError(f"{where}: {key!r} is not a regular expression: {error}") from None


def _parse_layers(key: str, layer_list: str, where: str) -> list[int]:
    """Returns the layers of a list such as "0-2,7". Raises UsageError for an invalid one; `key` is for its message."""
    layers: list[int] = []
    for part in layer_list.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UsageError(f"{where}: {key!r} is not a range of layers; use layers 0-29, or layers 0-2,7")
        layers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return layers


def format_ranges(numbers: Iterable[int]) -> str:
    """Formats layers as a key of a device map names them, such as "0-2,7"; inverse of `_parse_layers`."""
    ranges: list[list[int]] = []
    for layer in sorted(numbers):
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def merge_options(file_entries: Sequence[PlacementEntry], options: PlacementOptions) -> list[PlacementEntry]:
    """Returns a rule file's device map with the entries of options in front.

    `device` replaces the file's map, but not its `gpu_experts`, and leaves the routed experts on the CPU unless
    `moe_device` or `devices` places them.

    Args:
        file_entries: the entries of the rule file.
        options: the placement options.

    Raises:
        UsageError: an option is invalid.
    """
    moe_device, shared_expert_device = options.moe_device, options.shared_expert_device
    entries = [
        parse_entry(key, value, f"devices, {key}", explicit=True) for key, value in (options.devices or {}).items()
    ]
    if options.gpu_experts is not None:
        entries.append(parse_gpu_experts("all", options.gpu_experts))
    else:
        entries += [entry for entry in file_entries if entry.num_gpu_experts is not None]
    file_entries = [entry for entry in file_entries if entry.num_gpu_experts is None]
    if moe_device is not None:
        entries.append(
            parse_entry("experts", "cpu" if moe_device == "numa" else moe_device, "moe_device", explicit=True)
        )
    if shared_expert_device is not None:
        entries.append(parse_entry("shared_experts", shared_expert_device, "shared_expert_device", explicit=True))
    if options.device is None:
        return [*entries, *file_entries]
    all_entry = parse_entry("all", options.device, "device", explicit=True)
    if all_entry.device != "cpu" and moe_device is None:
        entries.append(parse_entry("experts", "cpu", implied=True))
    return [*entries, all_entry]


def split_layers(device_map: Sequence[PlacementEntry], layers: Sequence[int]) -> list[PlacementEntry]:
    """Returns the map with a single device per entry: one that splits layers becomes an entry per GPU.

    The modules after the last layer go to the last GPU.

    Args:
        device_map: the entries, of which one may name several GPUs.
        layers: for each layer the index of its GPU among these, in ascending order.
    """
    entries: list[PlacementEntry] = []
    for entry in device_map:
        gpu_names = entry.split_devices
        if gpu_names:
            for gpu_index, device in enumerate(gpu_names[1:], 1):  # the first GPU gets the rest, by the entry itself
                gpu_layers = [layer for layer, layer_gpu in enumerate(layers) if layer_gpu == gpu_index]
                if gpu_layers:
                    entries.append(
                        replace(
                            parse_entry(f"layers {format_ranges(gpu_layers)}", device, entry.where),
                            explicit=entry.explicit,
                        )
                    )
            entries += [
                replace(parse_entry(key, gpu_names[-1], entry.where, implied=True), explicit=entry.explicit)
                for key in AFTER_LAST_LAYER
            ]
        entries.append(replace(entry, device=gpu_names[0]) if gpu_names else entry)
    return entries
