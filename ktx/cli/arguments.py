"""Command-line words that several commands share. No torch here: help must be instant."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ktx.errors import BadFile, UsageError
from ktx.weights.gguf_files import ggufs_in, is_gguf


class Parser(argparse.ArgumentParser):
    """Takes --like_this for --like-this, and answers an unknown option with the nearest one. Usage errors exit with 2."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):  # type: ignore[no-untyped-def, override]
        words = [_dashed(word, self._option_string_actions) for word in (sys.argv[1:] if args is None else args)]
        found, left = super().parse_known_args(self._flags_alone(words), namespace)
        if left:  # here, where the options are known that the word may have meant
            self.error(f"unrecognized arguments: {' '.join(left)}")
        return found, left

    def _flags_alone(self, words: list[str]) -> list[str]:
        """A flag takes the next word only where that is a truth value; else it would take a positional argument's."""
        if all(action.option_strings for action in self._actions):
            return words  # nothing else could be meant, and a word that is no truth value is an error
        told: list[str] = []
        for word in words:
            flag = bool(told) and isinstance(self._option_string_actions.get(told[-1]), Flag)
            if flag and word.lower() in TRUTH:
                told[-1] += f"={word}"
            else:
                told[-1:] = [f"{told[-1]}=true", word] if flag else [*told[-1:], word]
        return told

    def error(self, message: str) -> NoReturn:
        options = [name for name in self._option_string_actions if name.startswith("--")]
        unknown = message.partition("unrecognized arguments: ")[2].split()
        for word in unknown:
            close = difflib.get_close_matches(word.split("=")[0].replace("_", "-"), options, n=1)
            if close:
                message += f" (did you mean {close[0]}?)"
        self.exit(2, f"{self.prog}: {message}\n{self.prog}: --help shows the options\n")


def _dashed(word: str, known: dict[str, argparse.Action]) -> str:
    if not word.startswith("--") or len(word) < 3:
        return word
    name, equals, value = word.partition("=")
    dashed = "--" + name[2:].replace("_", "-")
    return dashed + equals + value if dashed in known else word


class Flag(argparse.BooleanOptionalAction):
    """A truth value. `--name` and `--no-name` each exist, alone or before true or false; `--no-name false` is `--name`.

    Either may be the one that is named first: that one's value is what the namespace holds.
    """

    def __init__(
        self, option_strings: Sequence[str], dest: str, default: bool = False, help: str | None = None, **more: Any
    ):
        given = list(option_strings)
        self.others = [_opposite(name) for name in given if name.startswith("--")]
        argparse.Action.__init__(
            self, [*given, *self.others], dest, "?", None, default, yes_no, help=help, metavar="true|false"
        )

    def meant(self, name: str, value: bool | None) -> bool:
        """The value for the namespace of an option of ours with a value, or alone (None)."""
        return (value is None or value) != (name in self.others)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, self.meant(option_string or "", values))


def _opposite(name: str) -> str:
    return f"--{name[5:]}" if name.startswith("--no-") else f"--no-{name[2:]}"


class Inner(argparse._SubParsersAction):
    """A sub-command that has options of its own: one that stands before its name would be lost."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for action in parser._actions:
            if action.dest != self.dest and getattr(namespace, action.dest, action.default) != action.default:
                parser.error(f"{action.option_strings[0]} stands before {values[0]}: write it behind")
        super().__call__(parser, namespace, values, option_string)


class Settings(argparse.Action):
    """--config FILE: options by their names in YAML. What the command line says, before or after it, counts more."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        import yaml

        try:
            node = yaml.compose(Path(values).expanduser().read_text(encoding="utf-8"), yaml.SafeLoader)
        except OSError as error:
            parser.error(f"--config {values}: cannot be read: {error.strerror}")
        except yaml.YAMLError as error:
            parser.error(f"--config {values}: is no YAML: {str(error).splitlines()[0]}")
        if node is not None and not isinstance(node, yaml.MappingNode):
            parser.error(f"--config {values}: must be a mapping of options to values")
        for key, value in node.value if node is not None else ():
            where = f"--config {values}, line {key.start_mark.line + 1}"
            name = "--" + str(key.value).replace("_", "-")
            action = parser._option_string_actions.get(name)
            if action is None or action is self or action.dest == "help":
                close = difflib.get_close_matches(name, list(parser._option_string_actions), n=1)
                parser.error(
                    f"{where}: no option is called {key.value!r}"
                    + (f" (did you mean {close[0][2:]!r}?)" if close else "")
                )
            words = [item.value for item in value.value] if isinstance(value, yaml.SequenceNode) else [value.value]
            made = [self._value(parser, action, name, word, f"{where}: {key.value}") for word in words]
            if getattr(namespace, action.dest, None) == action.default:
                setattr(namespace, action.dest, made if isinstance(action, argparse._AppendAction) else made[-1])

    @staticmethod
    def _value(parser: Any, action: Any, name: str, word: Any, where: str) -> Any:
        if not isinstance(word, str):
            parser.error(f"{where} must be a value or a list of values")
        try:
            made = action.type(word) if action.type else word
        except (argparse.ArgumentTypeError, ValueError) as error:
            parser.error(f"{where}: {error}")
        if action.choices is not None and made not in action.choices:
            parser.error(f"{where} must be one of {', '.join(action.choices)}, found {word!r}")
        return action.meant(name, made) if isinstance(action, Flag) else made


TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def yes_no(text: str) -> bool:
    """The value of an option like --force_think true."""
    if text.lower() not in TRUTH:
        raise argparse.ArgumentTypeError(f"must be true or false, found {text!r}")
    return TRUTH[text.lower()]


def positive(text: str) -> int:
    return _at_least(1, text)


def natural(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, found {text!r}") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, found {value}")
    return value


SIZES = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}


def size(text: str) -> int:
    """Bytes: 24G (of 10^9), 22.5GiB (of 2^30), or a plain number."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if found is None or found[2] not in SIZES or not float(found[1]):
        raise argparse.ArgumentTypeError(f"must be bytes such as 24G or 22.5GiB, found {text!r}")
    return int(float(found[1]) * SIZES[found[2]])


def sizes(text: str) -> list[int]:
    """One or several of them: 24G,24G."""
    return [size(part) for part in text.split(",")]


def rate(text: str) -> float:
    """GB/s: more than nothing, and a number."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, found {text!r}") from None
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"must be more than 0 and below 1000000 GB/s, found {text}")
    return value


def tokens(text: str) -> int:
    """A number of tokens: 32K is 32768."""
    return positive(text[:-1]) * 1024 if text[-1:] in ("k", "K") else positive(text)


def counts(text: str) -> list[int]:
    """One or several positive numbers: 512,2048."""
    return [positive(part) for part in text.split(",")]


def flag(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup, *names: str, help: str, default: bool = False
) -> None:
    """An option that stands alone or takes true or false, with its opposite."""
    parser.add_argument(*names, action=Flag, default=default, help=help)


def debug_option(parser: argparse.ArgumentParser) -> None:
    flag(parser, "--debug", help="show the traceback of an error")


def threads_option(group: argparse._ArgumentGroup) -> None:
    """--cpu-infer, as KTransformers calls it."""
    group.add_argument(
        "--cpu-infer",
        "--threads",
        "-t",
        dest="threads",
        type=positive,
        metavar="N",
        help="worker threads (default: usable physical cores)",
    )


def speculation_options(group: argparse._ArgumentGroup) -> None:
    """--speculative and --draft-tokens, for whoever makes an engine."""
    group.add_argument(
        "--speculative",
        choices=("mtp", "prompt_lookup"),
        help="guess tokens and check several in one forward, the answer stays the same; mtp: by the model's own layer for it, prompt_lookup: by what the text says elsewhere",
    )
    group.add_argument(
        "--draft-tokens",
        type=positive,
        default=8,
        metavar="N",
        help="most tokens guessed at once; how many of them are is decided by what they cost and how often they are right (default 8)",
    )


def batched_option(group: argparse._ArgumentGroup, default: str) -> None:
    """--max-num-batched-tokens and its KTransformers name; `default` in words."""
    group.add_argument(
        "--max-num-batched-tokens",
        "--chunk-size",
        dest="chunk_size",
        type=positive,
        metavar="N",
        help=f"prompt tokens computed in one step where no answer is being written (default: {default})",
    )


def step_options(group: argparse._ArgumentGroup) -> None:
    """--max-num-batched-tokens and --max-itl-ms of an engine."""
    batched_option(group, "2048, after a long past up to 8192, fewer where memory is short")
    group.add_argument(
        "--max-itl-ms",
        type=positive,
        default=500,
        metavar="MS",
        help="inter-token latency: beside answers a step computes as many prompt tokens as take so many milliseconds, by the measured rate, 64 at least (default 500)",
    )


def graphs_option(group: argparse._ArgumentGroup) -> None:
    """--no-cuda-graphs, for whoever makes an engine."""
    flag(
        group,
        "--no-cuda-graphs",
        help="launch every kernel of a token by itself: with all layers on one GPU a token's kernels are launched as one, which is captured when the model has been loaded",
    )


def lora_option(parser: argparse.ArgumentParser, meant: str) -> argparse._ArgumentGroup:
    """--lora and vLLM's name for it, in a group of their own; `meant`: what several of them do."""
    group = parser.add_argument_group("adapters")
    group.add_argument(
        "--lora",
        "--lora-modules",
        dest="lora",
        action="append",
        metavar="[NAME=]PATH[=SCALE]",
        help=f"LoRA adapter: PEFT's folder with adapter_config.json, or llama.cpp's GGUF file; several times: {meant}",
    )
    return group


def model_options(parser: argparse.ArgumentParser) -> None:
    """--model, --weights, --rules and their KTransformers names; `named_model` settles which one is meant."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        "--model-path",
        dest="model",
        metavar="DIR",
        help="Hugging Face folder or hub id (config.json, tokenizer), or a GGUF file alone",
    )
    group.add_argument(
        "--weights",
        "--gguf-path",
        dest="weights",
        metavar="PATH",
        help="GGUF file, the first of a split one, a folder of it, or safetensors (default: the model folder)",
    )
    group.add_argument(
        "--rules",
        "--optimize-config-path",
        dest="rules",
        metavar="FILE",
        help="rule file, or the name of a shipped one (default: by architecture)",
    )
    group.add_argument(
        "--dtype",
        default="auto",
        metavar="TYPE",
        help="float weights become int8, int4 (groups of 128), int4g64 or int4g32 while they are read (default auto: stay)",
    )
    group.add_argument("--moe-dtype", metavar="TYPE", help="the same for experts alone (default: as --dtype)")
    group.add_argument(
        "--moe-experts",
        type=positive,
        metavar="K",
        help="experts a token, fewer than the model asks for: faster, less exact",
    )
    group.add_argument(
        "--defer-experts",
        type=int,
        default=0,
        metavar="D",
        help="the D experts of a token that weigh least are added one layer later, so that a GPU and the CPU do not wait for each other: faster there, less exact (default 0)",
    )
    group.add_argument(
        "--kv-dtype",
        "--kv-cache-dtype",
        dest="kv_dtype",
        default="auto",
        metavar="TYPE",
        help="keys and values are kept as f16, bf16, f32, q8_0 (half the memory of f16; a GPU keeps f16) or fp8 (half on a GPU; q8_0 on the CPU); default f16",
    )
    group.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="keep packed weights in DIR: the first start writes them (as much disk as memory), later ones only map them",
    )
    flag(group, "--trust-remote-code", help="run Python code that comes with the model (default: never)")
    flag(
        group,
        "--no-self-test",
        help="skip the few tokens that are computed when the model has been loaded, whole and through the cache, to prove that both agree (status 4 if not)",
    )
    placement_options(parser)


def placement_options(parser: argparse.ArgumentParser) -> None:
    """Where modules are: --device and what goes elsewhere."""
    group = parser.add_argument_group("placement")
    group.add_argument(
        "--device",
        metavar="DEVICE",
        help="cpu, cuda, cuda:N, or GPUs that share the layers (cuda:0,cuda:1): where everything but the routed experts is (default: as the rule file says, else cpu)",
    )
    group.add_argument(
        "--moe-device",
        metavar="DEVICE",
        help="where the routed experts are: cpu, numa (the same: the CPU with its memory nodes), cuda or cuda:N (default cpu)",
    )
    group.add_argument(
        "--gpu-experts",
        type=natural,
        metavar="N",
        help="so many routed experts of each layer are on its GPU when the others are on the CPU; both sides compute at once (default: as the rule file says, else 0)",
    )
    group.add_argument(
        "--stream-experts",
        metavar="N",
        help="prompts of N tokens or more have experts in memory copied to their layer's GPU and computed there: a number, auto (from where that is faster) or off (default: as the rule file says, else auto)",
    )
    group.add_argument(
        "--shared-device",
        metavar="DEVICE",
        help="where shared experts are (default: as --device)",
    )
    group.add_argument(
        "--devices",
        action="append",
        type=keyed,
        metavar="MODULES=DEVICE",
        help="places by name, as a rule file's map of devices: 'layers 0-29=cuda:1'; several times",
    )


def keyed(text: str) -> tuple[str, str]:
    """An entry of a map: key=value."""
    key, equals, value = text.rpartition("=")
    if not equals or not key or not value:
        raise argparse.ArgumentTypeError(f"must be MODULES=DEVICE, found {text!r}")
    return key.strip(), value.strip()


def placed(args: argparse.Namespace) -> dict[str, Any]:
    """What ktx.load and ktx.plan are told of placement."""
    return {
        "device": args.device,
        "moe_device": args.moe_device,
        "shared_device": args.shared_device,
        "gpu_experts": args.gpu_experts,
        "devices": dict(args.devices) if args.devices else None,
    }


def load_options(args: argparse.Namespace, engine: bool = False) -> dict[str, Any]:
    """What ktx.load is told beside the model: the options above by its own names. `engine`: an engine is made of the model, and makes its self-test."""
    return {
        "weight_dtype": args.dtype,
        "moe_dtype": args.moe_dtype,
        "moe_experts": args.moe_experts,
        "defer_experts": args.defer_experts,
        "kv_dtype": args.kv_dtype,
        "cache_dir": args.cache_dir,
        "trust_remote_code": args.trust_remote_code,
        "stream_experts": args.stream_experts,
        "self_test": False if args.no_self_test else "engine" if engine else True,
        "lora": getattr(args, "lora", None),
        **placed(args),
    }


Adds = Callable[[argparse.ArgumentParser], None]  # a command's add_arguments, or a part of it


def options_of(*adds: Adds) -> dict[str, argparse.Action]:
    """The options that functions add to a parser, by the name of their value."""
    parser = argparse.ArgumentParser(add_help=False)
    for add in adds:
        add(parser)
    return {action.dest: action for action in parser._actions if action.option_strings}


def refuse(args: argparse.Namespace, options: Mapping[str, argparse.Action], why: str) -> None:
    """UsageError for one of the options that is given, which this run of the command would not read: `why` ends the message."""
    for name, action in options.items():
        if getattr(args, name, action.default) != action.default:
            name = next((word for word in action.option_strings if word.startswith("--")), action.option_strings[0])
            raise UsageError(f"{name} {why}")


def named_model(args: argparse.Namespace) -> bool:
    """Puts what --weights alone says into `args.model`; False when neither is given. UsageError when it needs a folder beside it, BadFile when it is not there."""
    if args.model is not None or not args.weights:
        return args.model is not None
    path = Path(args.weights).expanduser()
    if not path.exists():
        raise BadFile(f"{args.weights}: no such file or folder; `ktx download` fetches a model from a hub")
    path = path if (path / "config.json").exists() else gguf_in(path)
    if is_gguf(path) or (path / "config.json").exists():
        args.model = str(path)
        return True
    raise UsageError(
        f"--weights {args.weights} needs --model: the Hugging Face folder (config.json, tokenizer) it belongs to"
    )


def gguf_in(path: Path) -> Path:
    """The first GGUF file of a folder; anything else as it is."""
    return next(iter(ggufs_in(path)), path) if path.is_dir() else path


def require_model(args: argparse.Namespace) -> None:
    """UsageError when no model is named."""
    if not named_model(args):
        raise UsageError(
            "no model is named: give --model DIR (a Hugging Face folder or hub id), or --weights FILE.gguf"
        )
