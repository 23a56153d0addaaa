"""Rule files: YAML -> rules -> a plan.

A rule file is a list; each item has `match` (`name`, a regular expression searched in the module path, and/or `class`, dotted or
short, compared with the module's class and its bases) and `replace` (`class`, an operator's short name or a dotted path,
or `default` to keep the module; `kwargs`), and optionally `recursive` and `device`. The first rule that matches wins.
Or it is a mapping: `devices` says where modules are (ktx.injection.device_map), `gpu_experts` how many of a layer's experts are on its GPU,
`stream_experts` from how many tokens on the others come there, `rules` is such a list or names another file's; without it they are the model's own.
Parsing knows no torch; every error names file and line.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ktx.errors import BadFile, UsageError, did_you_mean
from ktx.injection.device_map import PlacementEntry, place, share, streaming

FILE_KEYS = ("devices", "gpu_experts", "stream_experts", "rules")  # of a file that is a mapping
KEYS: dict[str, dict[str, type]] = {
    "": {"match": dict, "replace": dict, "recursive": bool, "device": str},
    "match": {"name": str, "class": str},
    "replace": {"class": str, "kwargs": dict, "device": str},
}
FILES = {  # model_type -> rule file; a type that is not here gets `generic`
    "deepseek_v2": "deepseek-v2",
    "deepseek_v3": "deepseek-v3",
    "kimi_k2": "deepseek-v3",
    "qwen2_moe": "qwen2-moe",
    "qwen3_moe": "qwen3-moe",
    "qwen3_next": "qwen3-next",
    "qwen3_5_moe_text": "qwen3_5-moe",
    "qwen3_5_text": "qwen3_5",
    "mixtral": "mixtral",
    "dots1": "dots1",
    "olmoe": "olmoe",
    "glm4_moe": "glm4-moe",
    "glm4_moe_lite": "glm4-moe-lite",
    "minimax_m2": "minimax-m2",
    "ernie4_5_moe": "ernie4_5-moe",
    "gpt_oss": "gpt-oss",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
}


@dataclass(frozen=True)
class Rule:
    """One entry of a rule file. `replace` None keeps the module; `where` is "file:line" for messages."""

    name: re.Pattern[str] | None = None
    cls: str | None = None
    replace: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None
    recursive: bool = True
    where: str = "rule"

    def __post_init__(self) -> None:
        if isinstance(self.name, str):  # a rule written in Python may give the expression as text
            object.__setattr__(self, "name", re.compile(self.name))
        if self.name is None and self.cls is None:
            raise UsageError(f"{self.where}: a rule must match something: give match.name or match.class")

    def matches(self, path: str, cls: type) -> bool:
        if self.name is not None and not self.name.search(path):
            return False
        return self.cls is None or any(_is_called(base, self.cls) and _computes_as(cls, base) for base in cls.__mro__)


def _is_called(cls: type, name: str) -> bool:
    """A class's short name, its full path, or a path by which an imported package offers it (torch.nn.Linear)."""
    package, _, short = name.rpartition(".")
    if cls.__name__ != short:
        return False
    return not package or package == cls.__module__ or getattr(sys.modules.get(package), short, None) is cls


def _computes_as(cls: type, base: type) -> bool:
    """A subclass of one of torch's own layers that has a forward of its own is another formula, which no rule for the layer means."""
    is_layer = base.__module__.startswith("torch.nn.modules.") and base.__name__ != "Module"
    return not is_layer or cls.forward is base.forward  # type: ignore[attr-defined]


class Rules(list[Rule]):
    """The rules of a file, and the places that it gives to modules. `base` names the file whose rules they are; `explicit`: the user chose them.

    `stream_experts` is the file's word for ktx.injection.device_map.streaming, None where it has none.
    """

    stream_experts: int | str | None = None

    def __init__(
        self, rules: Iterable[Rule] = (), places: Sequence[PlacementEntry] = (), base: str = "", explicit: bool = True
    ):
        super().__init__(rules)
        self.places, self.base, self.explicit = list(places), base, explicit


class _YamlReader:
    """YAML values that remember their line."""

    def __init__(self, file: str):
        self.file = file

    def at(self, node: yaml.Node) -> str:
        return f"{self.file}:{node.start_mark.line + 1}"

    def mapping(self, node: yaml.Node, what: str) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            raise UsageError(f"{self.at(node)}: {what} must be a mapping of keys, found {_shown(node)}")
        found: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise UsageError(f"{self.at(key)}: a key of {what} must be a word, found {_shown(key)}")
            if key.value in found:
                raise UsageError(f"{self.at(key)}: the key {key.value!r} appears twice")
            found[key.value] = value
        return found

    def known(self, node: yaml.Node, section: str, keys: Iterable[str] = ()) -> dict[str, yaml.Node]:
        """The section's keys (default: those of KEYS); an unknown one is an error with the nearest that exists."""
        found, known = self.mapping(node, section or "a rule"), list(keys or KEYS[section])
        lines = {str(key.value): key for key, _ in node.value}
        for name in found:
            if name not in known:
                where = f" in {section}" if section else ""
                raise UsageError(
                    f"{self.at(lines[name])}: unknown key {name!r}{where}{did_you_mean(name, known)}; known: {' '.join(known)}"
                )
        return found

    def value(self, node: yaml.Node, kind: type, what: str) -> Any:
        try:
            value = yaml.SafeLoader("").construct_object(node, deep=True)
        except (
            Exception
        ) as error:  # a foreign tag, an impossible date: PyYAML's constructors raise whatever they trip over
            raise UsageError(
                f"{self.at(node)}: {what} cannot be read: {_first_line(getattr(error, 'problem', None) or error)}"
            ) from None
        if value is None and kind is not bool:
            return None
        if not isinstance(value, kind):
            raise UsageError(f"{self.at(node)}: {what} must be {_kind(kind)}, found {_shown(node)}")
        return value


def _kind(kind: type) -> str:
    return {bool: "true or false", str: "text", dict: "a mapping"}[kind]


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value)[:40]
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _first_line(error: object) -> str:
    return str(error).partition("\n")[0]


def parse(text: str, file: str = "<rules>", model_type: str = "") -> Rules:
    """Rules of a YAML text, and its map of devices; a mapping may leave its rules to another file. UsageError with file and line for whatever cannot be meant."""
    root, at = _composed(text, file), _YamlReader(file)
    return _mapping(root, at, model_type) if isinstance(root, yaml.MappingNode) else Rules(_list(root, at), base=file)


def _composed(text: str, file: str) -> yaml.Node:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UsageError(
            f"{file}:{mark.line + 1 if mark else 1}: is no YAML: {_first_line(getattr(error, 'problem', None) or error)}"
        ) from None
    except RecursionError:
        raise UsageError(f"{file}:1: is nested too deeply for a rule file") from None
    if root is None:
        raise UsageError(f"{file}:1: holds no rules")
    return root


def _list(node: yaml.Node, at: _YamlReader) -> list[Rule]:
    if not isinstance(node, yaml.SequenceNode):
        raise UsageError(f"{at.at(node)}: rules are a list; begin each with '- match:'")
    from ktx.injection.ktransformers import translate

    return [translate(_rule(item, at)) for item in node.value]


def _mapping(root: yaml.Node, at: _YamlReader, model_type: str) -> Rules:
    """A file with a map of devices, and rules, a name of some, or none."""
    if any(getattr(key, "value", "") in ("match", "replace") for key, _ in root.value):
        raise UsageError(
            f"{at.at(root)}: a rule file is a list, or a mapping of devices and rules; begin each rule with '- match:'"
        )
    keys = at.known(root, "a rule file", FILE_KEYS)
    places = _places(keys["devices"], at) if "devices" in keys else []
    places += _shares(keys["gpu_experts"], at) if "gpu_experts" in keys else []
    found = _rules_of(keys, places, at, model_type)
    if "stream_experts" in keys:
        found.stream_experts = _streaming(keys["stream_experts"], at)
    return found


def _rules_of(keys: Mapping[str, yaml.Node], places: list[PlacementEntry], at: _YamlReader, model_type: str) -> Rules:
    if "rules" not in keys:
        return Rules(rules := load_rules(None, model_type), places, rules.base, explicit=False)
    if isinstance(keys["rules"], yaml.SequenceNode):
        return Rules(_list(keys["rules"], at), places, at.file)
    name = at.value(keys["rules"], str, "rules, a list or the name of a file,") or ""
    beside = Path(at.file).parent / name
    try:
        path = _file(beside if beside.is_file() else name)
        node = _composed(_text(path), str(path))
    except BadFile as error:
        raise BadFile(f"{at.at(keys['rules'])}: {error}") from None
    return Rules(_list(node, _YamlReader(str(path))), places, str(path))


def _places(node: yaml.Node, at: _YamlReader) -> list[PlacementEntry]:
    found, lines = at.mapping(node, "devices"), {str(key.value): key for key, _ in node.value}
    places = []
    for key, value in found.items():
        items = value.value if isinstance(value, yaml.SequenceNode) else [value]
        places.append(place(key, [_device(item, at) for item in items], at.at(lines[key])))
    return places


def _shares(node: yaml.Node, at: _YamlReader) -> list[PlacementEntry]:
    """Experts on a GPU beside others on the CPU: of all layers, or by layers as in a map of devices."""
    if isinstance(node, yaml.SequenceNode):
        raise UsageError(f"{at.at(node)}: gpu_experts must be a number, or a mapping of layers to numbers")
    found = at.mapping(node, "gpu_experts") if isinstance(node, yaml.MappingNode) else {"all": node}
    return [
        share(key, at.value(value, object, "gpu_experts"), f"{at.at(value)}: gpu_experts")
        for key, value in found.items()
    ]


def _streaming(node: yaml.Node, at: _YamlReader) -> int | str:
    least = streaming(at.value(node, object, "stream_experts"), f"{at.at(node)}: stream_experts")
    return "auto" if least is None else least or "off"


def _device(node: yaml.Node, at: _YamlReader) -> str:
    return str(at.value(node, str, "a device") or "")


def _rule(node: yaml.Node, at: _YamlReader) -> Rule:
    top = at.known(node, "")
    if "match" not in top:
        raise UsageError(f"{at.at(node)}: a rule needs 'match'")
    match = at.known(top["match"], "match")
    replace = at.known(top["replace"], "replace") if "replace" in top else {}
    name = at.value(match["name"], str, "match.name") if "name" in match else None
    cls = at.value(match["class"], str, "match.class") if "class" in match else None
    if not name and not cls:
        raise UsageError(f"{at.at(top['match'])}: match needs a name or a class")
    new = at.value(replace["class"], str, "replace.class") if "class" in replace else "default"
    kwargs = at.value(replace["kwargs"], dict, "replace.kwargs") if "kwargs" in replace else None
    device = next(
        (at.value(section["device"], str, "device") for section in (top, replace) if "device" in section), None
    )
    return Rule(
        _pattern(name, match, at),
        cls,
        None if new in ("default", None) else new,
        kwargs or {},
        device,
        at.value(top["recursive"], bool, "recursive") if "recursive" in top else True,
        at.at(node),
    )


def _pattern(name: str | None, match: Mapping[str, yaml.Node], at: _YamlReader) -> re.Pattern[str] | None:
    if not name:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what a later Python may read otherwise
            return re.compile(name)
    except re.error as error:
        raise UsageError(f"{at.at(match['name'])}: match.name {name!r} is no regular expression: {error}") from None


# ---- finding rule files


def rule_folder() -> Path:
    """Where the shipped rule files lie: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parent.parent
    checkout = package.parent / "optimize_rules"
    return checkout if checkout.is_dir() else package / "optimize_rules"


def shipped() -> list[str]:
    return sorted(file.stem for file in rule_folder().glob("*.yaml"))


def load_rules(rules: str | Path | Sequence[Rule] | None, model_type: str = "") -> Rules:
    """Rules by name ("deepseek-v3"), by path, as a list, or (None) by model type."""
    if isinstance(rules, Rules):
        return rules
    if isinstance(rules, (list, tuple)):
        strange = next((rule for rule in rules if not isinstance(rule, Rule)), None)
        if strange is not None:
            raise UsageError(
                f"rules: a list must hold ktx.Rule, found {type(strange).__name__}; a file is given by its path"
            )
        return Rules(rules)
    explicit = rules is not None
    path = _file(rules if explicit else FILES.get(model_type, "generic"))
    found = parse(_text(path), str(path), model_type)
    found.explicit = found.explicit and explicit
    return found


def _file(rules: object) -> Path:
    """The file that is meant: a path, or the name of a shipped one."""
    path = Path(str(rules)).expanduser()
    if path.is_file():
        return path
    named = rule_folder() / f"{path.name.removesuffix('.yaml').lower()}.yaml"
    if path.parent != Path(".") or not named.is_file():
        raise BadFile(
            f"{rules}: no such rule file, and no shipped one is called so{did_you_mean(path.stem, shipped())}; shipped: {' '.join(shipped())}"
        )
    return named


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadFile(f"{path}: cannot be read as a rule file: {error}") from error
