"""Rule files: parses YAML into rules and a device map.

A rule file is a list. Each item has `match` (`name`, a regular expression searched in the module path, and/or `class`,
a dotted or short name, or a regular expression for one, compared with the module's class and its bases) and `replace`
(`class`, an operator's short name or dotted path, or `default` to keep the module; `kwargs`), and optionally
`recursive` and `device`. The first rule that matches applies.

A file may also be a mapping: `devices` is the device map (ktx.injection.device_map), `gpu_experts` the number of
experts per layer on its GPU, `stream_experts_min_tokens` the min number of tokens from which the other experts are
streamed to it, and `rules` a list of rules or the name of another rule file; default: the rules of the model's
architecture. Parsing does not import torch; every error names file and line.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ktx.errors import BadFile, UsageError, did_you_mean
from ktx.families import RULE_ALIASES, RULE_FILES
from ktx.injection.device_map import PlacementEntry, parse_entry, parse_gpu_experts, parse_stream_experts
from ktx.injection.ktransformers import translate
from ktx.injection.rule import CLASS_PATH, Rule, compile_pattern
from ktx.utils.deprecation import SINCE, deprecated_arguments, deprecated_members

FILE_KEYS = ("devices", "gpu_experts", "stream_experts_min_tokens", "rules")  # keys of a file that is a mapping
OLD_FILE_KEYS = {"stream_experts": "stream_experts_min_tokens"}  # names of keys in ktx 0.1, which end with 0.3
KEYS: dict[str, dict[str, type]] = {
    "": {"match": dict, "replace": dict, "recursive": bool, "device": str},
    "match": {"name": str, "class": str},
    "replace": {"class": str, "kwargs": dict, "device": str},
}


@deprecated_members(places="entries", asked="explicit", stream_experts="stream_experts_min_tokens")
@deprecated_arguments(asked="explicit")
class Rules(list[Rule]):
    """The rules of a file with its device map.

    `base` names the file that the rules are from; `explicit` means that the user chose the rules.
    `stream_experts_min_tokens` is the file's value for ktx.injection.device_map.parse_stream_experts, or None.
    """

    stream_experts_min_tokens: int | str | None = None

    def __init__(
        self, rules: Iterable[Rule] = (), entries: Sequence[PlacementEntry] = (), base: str = "", explicit: bool = True
    ):
        super().__init__(rules)
        self.entries, self.base, self.explicit = list(entries), base, explicit


class _YamlReader:
    """Reads values of YAML nodes; errors name file and line."""

    def __init__(self, file: str):
        self.file = file

    def locate(self, node: yaml.Node) -> str:
        """Returns "file:line" of a node, the prefix of messages about it."""
        return f"{self.file}:{node.start_mark.line + 1}"

    def read_mapping(self, node: yaml.Node, label: str) -> dict[str, yaml.Node]:
        """Returns the entries of a mapping. Raises UsageError for another node or a repeated key."""
        if not isinstance(node, yaml.MappingNode):
            raise UsageError(f"{self.locate(node)}: {label} must be a mapping of keys, found {_node_label(node)}")
        entries: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise UsageError(f"{self.locate(key)}: a key of {label} must be a word, found {_node_label(key)}")
            if key.value in entries:
                raise UsageError(f"{self.locate(key)}: the key {key.value!r} appears twice")
            entries[key.value] = value
        return entries

    def read_section(self, node: yaml.Node, section: str, keys: Iterable[str] = ()) -> dict[str, yaml.Node]:
        """Returns a section's entries. Raises UsageError for a key that is not in `keys` (default: in KEYS)."""
        entries, known_keys = self.read_mapping(node, section or "a rule"), list(keys or KEYS[section])
        key_nodes = {str(key.value): key for key, _ in node.value}
        for name in entries:
            if name not in known_keys:
                context = f" in {section}" if section else ""
                raise UsageError(
                    f"{self.locate(key_nodes[name])}: unknown key {name!r}{context}{did_you_mean(name, known_keys)};"
                    f" known: {' '.join(known_keys)}"
                )
        return entries

    def read_value(self, node: yaml.Node, kind: type, label: str) -> Any:
        """Returns a node's value; None for an empty one, except of a bool. UsageError: it is not of type `kind`."""
        try:
            value = yaml.SafeLoader("").construct_object(node, deep=True)
        except Exception as error:  # an unknown tag or an invalid date: PyYAML's constructors raise any type
            raise UsageError(
                f"{self.locate(node)}: {label} cannot be read: {_first_line(getattr(error, 'problem', None) or error)}"
            ) from None
        if value is None and kind is not bool:
            return None
        if not isinstance(value, kind):
            raise UsageError(f"{self.locate(node)}: {label} must be {_type_label(kind)}, found {_node_label(node)}")
        return value


def _type_label(kind: type) -> str:
    return {bool: "true or false", str: "text", dict: "a mapping"}[kind]


def _node_label(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value)[:40]
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _first_line(error: object) -> str:
    return str(error).partition("\n")[0]


def parse_rules(text: str, file: str = "<rules>", model_type: str = "") -> Rules:
    """Parses the YAML text of a rule file.

    Args:
        text: the file's text.
        file: the file's name for messages; rule files that it names are looked up relative to it.
        model_type: selects the rules of a mapping without `rules`.

    Raises:
        UsageError: the text is invalid; the message names file and line.
        BadFile: a rule file that it names cannot be read.
    """
    root, reader = _compose(text, file), _YamlReader(file)
    return (
        _parse_rule_mapping(root, reader, model_type)
        if isinstance(root, yaml.MappingNode)
        else Rules(_parse_rule_list(root, reader), base=file)
    )


def _compose(text: str, file: str) -> yaml.Node:
    """Parses YAML into nodes, which have line numbers for error messages. Raises UsageError, with the line."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UsageError(
            f"{file}:{mark.line + 1 if mark else 1}: is not valid YAML:"
            f" {_first_line(getattr(error, 'problem', None) or error)}"
        ) from None
    except RecursionError:
        raise UsageError(f"{file}:1: is nested too deeply for a rule file") from None
    if root is None:
        raise UsageError(f"{file}:1: contains no rules")
    return root


def _parse_rule_list(node: yaml.Node, reader: _YamlReader) -> list[Rule]:
    if not isinstance(node, yaml.SequenceNode):
        raise UsageError(f"{reader.locate(node)}: rules are a list; start each rule with '- match:'")
    return [translate(_parse_rule(item, reader)) for item in node.value]


def _parse_rule_mapping(root: yaml.Node, reader: _YamlReader, model_type: str) -> Rules:
    """Returns the rules and the device map of a file that is a mapping; warns of keys that ktx 0.1 named differently.

    A single rule without the dash of a list is a mapping too, so the error for it says how rules begin.
    """
    if any(getattr(key, "value", "") in ("match", "replace") for key, _ in root.value):
        raise UsageError(
            f"{reader.locate(root)}: a rule file is a list, or a mapping of devices and rules;"
            " start each rule with '- match:'"
        )
    for key, _ in root.value:
        if isinstance(key, yaml.ScalarNode) and (current := OLD_FILE_KEYS.get(key.value)):
            warnings.warn(f"{reader.locate(key)}: {key.value} is called {current} {SINCE}", FutureWarning, stacklevel=2)
            key.value = current
    sections = reader.read_section(root, "a rule file", FILE_KEYS)
    entries = _parse_devices(sections["devices"], reader) if "devices" in sections else []
    entries += _parse_gpu_experts(sections["gpu_experts"], reader) if "gpu_experts" in sections else []
    rules = _parse_rules_section(sections, entries, reader, model_type)
    if "stream_experts_min_tokens" in sections:
        rules.stream_experts_min_tokens = _parse_stream_experts(sections["stream_experts_min_tokens"], reader)
    return rules


def _parse_rules_section(
    sections: Mapping[str, yaml.Node], entries: list[PlacementEntry], reader: _YamlReader, model_type: str
) -> Rules:
    """Returns the rules of the section `rules`: a list, those of another file, or those of the model's architecture."""
    if "rules" not in sections:
        return Rules(rules := load_rules(None, model_type), entries, rules.base, explicit=False)
    if isinstance(sections["rules"], yaml.SequenceNode):
        return Rules(_parse_rule_list(sections["rules"], reader), entries, reader.file)
    name = reader.read_value(sections["rules"], str, "rules, a list or the name of a file,") or ""
    sibling = Path(reader.file).parent / name  # a file in the same folder comes before a shipped one
    try:
        path = _find_rule_file(sibling if sibling.is_file() else name)
        node = _compose(_read_text(path), str(path))
    except BadFile as error:
        raise BadFile(f"{reader.locate(sections['rules'])}: {error}") from None
    return Rules(_parse_rule_list(node, _YamlReader(str(path))), entries, str(path))


def _parse_devices(node: yaml.Node, reader: _YamlReader) -> list[PlacementEntry]:
    """Parses `devices`, the device map: an entry per key, with one device or, for `all`, several."""
    sections, key_nodes = reader.read_mapping(node, "devices"), {str(key.value): key for key, _ in node.value}
    entries = []
    for key, value in sections.items():
        items = value.value if isinstance(value, yaml.SequenceNode) else [value]
        entries.append(parse_entry(key, [_parse_device(item, reader) for item in items], reader.locate(key_nodes[key])))
    return entries


def _parse_gpu_experts(node: yaml.Node, reader: _YamlReader) -> list[PlacementEntry]:
    """Parses `gpu_experts`: a number for all layers, or numbers by layers as in a device map."""
    if isinstance(node, yaml.SequenceNode):
        raise UsageError(f"{reader.locate(node)}: gpu_experts must be a number, or a mapping of layers to numbers")
    sections = reader.read_mapping(node, "gpu_experts") if isinstance(node, yaml.MappingNode) else {"all": node}
    return [
        parse_gpu_experts(key, reader.read_value(value, object, "gpu_experts"), f"{reader.locate(value)}: gpu_experts")
        for key, value in sections.items()
    ]


def _parse_stream_experts(node: yaml.Node, reader: _YamlReader) -> int | str:
    min_tokens = parse_stream_experts(
        reader.read_value(node, object, "stream_experts_min_tokens"),
        f"{reader.locate(node)}: stream_experts_min_tokens",
    )
    return "auto" if min_tokens is None else min_tokens or "off"


def _parse_device(node: yaml.Node, reader: _YamlReader) -> str:
    return str(reader.read_value(node, str, "a device") or "")


def _parse_rule(node: yaml.Node, reader: _YamlReader) -> Rule:
    """Parses one rule: `match` by name or class, and optionally `replace`, `device` and `recursive`.

    Raises UsageError for an unknown key or a wrong type, with file and line.
    """
    sections = reader.read_section(node, "")
    if "match" not in sections:
        raise UsageError(f"{reader.locate(node)}: a rule needs 'match'")
    match = reader.read_section(sections["match"], "match")
    replace = reader.read_section(sections["replace"], "replace") if "replace" in sections else {}
    name = reader.read_value(match["name"], str, "match.name") if "name" in match else None
    cls = reader.read_value(match["class"], str, "match.class") if "class" in match else None
    if not name and not cls:
        raise UsageError(f"{reader.locate(sections['match'])}: match needs a name or a class")
    new_class = reader.read_value(replace["class"], str, "replace.class") if "class" in replace else "default"
    kwargs = reader.read_value(replace["kwargs"], dict, "replace.kwargs") if "kwargs" in replace else None
    device = next(
        (reader.read_value(section["device"], str, "device") for section in (sections, replace) if "device" in section),
        None,
    )
    if cls and not CLASS_PATH.fullmatch(cls):
        compile_pattern(cls, f"{reader.locate(match['class'])}: match.class")
    return Rule(
        name=compile_pattern(name, f"{reader.locate(match['name'])}: match.name") if name else None,
        cls=cls,
        replace=None if new_class in ("default", None) else new_class,
        kwargs=kwargs or {},
        device=device,
        recursive=reader.read_value(sections["recursive"], bool, "recursive") if "recursive" in sections else True,
        where=reader.locate(node),
    )


# ---- finding rule files


def rule_folder() -> Path:
    """Folder of the shipped rule files: next to the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parent.parent
    checkout = package.parent / "optimize_rules"
    return checkout if checkout.is_dir() else package / "optimize_rules"


def shipped_rules() -> list[str]:
    """Names of the shipped rule files."""
    return sorted(file.stem for file in rule_folder().glob("*.yaml"))


def is_shipped(rule: Rule) -> bool:
    """Whether a rule is from a shipped file. Such a rule is written for several families, so it may match no module."""
    return Path(rule.where).resolve().parent == rule_folder()


def load_rules(rules: str | Path | Sequence[Rule] | None, model_type: str = "") -> Rules:
    """Returns the rules that a user chose, or else those of the model's architecture; Rules are returned as they are.

    Args:
        rules: the name of a shipped file ("deepseek-v3"), a path, a list of Rule, or None for those of `model_type`.
        model_type: the model_type of the configuration.

    Raises:
        BadFile: there is no such file, or it cannot be read.
        UsageError: the file or the list is invalid.
    """
    if isinstance(rules, Rules):
        return rules
    if isinstance(rules, (list, tuple)):
        invalid = next((rule for rule in rules if not isinstance(rule, Rule)), None)
        if invalid is not None:
            raise UsageError(
                f"rules: a list must contain ktx.Rule, found {type(invalid).__name__}; pass a file as its path"
            )
        return Rules(rules)
    explicit = rules is not None  # the user chose the rules
    path = _find_rule_file(rules if explicit else RULE_FILES.get(model_type, "generic"))
    parsed = parse_rules(_read_text(path), str(path), model_type)
    parsed.explicit = parsed.explicit and explicit
    return parsed


def _find_rule_file(rules: object) -> Path:
    """Returns the path of a rule file: an existing path, or a shipped file by its name or an alias in RULE_ALIASES."""
    path = Path(str(rules)).expanduser()
    if path.is_file():
        return path
    name = path.name.removesuffix(".yaml").lower()
    shipped_path = rule_folder() / f"{RULE_ALIASES.get(name, name)}.yaml"
    by_name = path.parent == Path(".") or path.parent.resolve() == rule_folder()
    if not by_name or not shipped_path.is_file():
        raise BadFile(
            f"{rules}: no such rule file, and no shipped one has this name"
            f"{did_you_mean(path.stem, [*shipped_rules(), *RULE_ALIASES])}; shipped: {' '.join(shipped_rules())}"
        )
    return shipped_path


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadFile(f"{path}: cannot be read as a rule file: {error}") from error
