"""Command-line options and argument types that several commands share.

This module does not import torch, so that `ktx --help` is instant.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ktx.errors import BadFile, UsageError
from ktx.utils.deprecation import SINCE
from ktx.weights.gguf_files import ggufs_in, is_gguf

OLD_OPTIONS = {  # names of ktx 0.1, which still work for one release -> the names of today
    "--dtype": "--quantize",
    "--moe-dtype": "--quantize-experts",
    "--cache-dir": "--packed-cache-dir",
    "--moe-experts": "--num-experts-per-tok",
    "--stream-experts": "--stream-experts-min-tokens",
    "--shared-device": "--shared-expert-device",
    "--hide-input": "--no-log-prompts",
    "--no-hide-input": "--log-prompts",
    "--keep-responses": "--max-stored-responses",
}
OLD_FORM = "since ktx 0.2; the old form ends with 0.3"
OptionStrings = Mapping[str, argparse.Action]  # a parser's options by each of their names


class Parser(argparse.ArgumentParser):
    """Argument parser that accepts --like_this for --like-this and suggests the nearest known option.

    A flag may be followed by true or false, as KTransformers' flags are. Usage errors exit with status 2.
    """

    def parse_known_args(  # type: ignore[no-untyped-def, override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ):
        """Parses arguments after replacing their names by those that argparse knows; exits on an unknown one.

        argparse would leave the error to the outermost parser, which does not know the subcommand's options.
        """
        arguments = self._in_current_form(list(sys.argv[1:] if args is None else args))
        parsed, unrecognized = super().parse_known_args(arguments, namespace)
        if unrecognized:  # reported by this parser, which knows the options that the argument may have meant
            self.error(f"unrecognized arguments: {' '.join(unrecognized)}")
        return parsed, unrecognized

    def _in_current_form(self, arguments: list[str]) -> list[str]:
        """Returns the arguments as argparse expects them; warns about the old forms.

        Options get their current names; a flag and its value (`--x true`, as in KTransformers) become `--x` or
        `--no-x`. Without positional arguments, whatever follows a flag and is no option is its value, else only true,
        false and their synonyms are.
        """
        current: list[str] = []
        has_positionals = any(not action.option_strings for action in self._actions)
        indices = iter(range(len(arguments)))
        for i in indices:
            given, equals, value = arguments[i].partition("=")
            name = current_option(given, self._option_string_actions)
            if name is None:  # no option: a value, or a positional argument
                current.append(arguments[i])
                continue
            if not isinstance(self._option_string_actions[name], argparse.BooleanOptionalAction):
                form = name
                current.append(form + equals + value)
            else:
                following = arguments[i + 1] if i + 1 < len(arguments) else "-"
                if not equals and (following.lower() in BOOLEANS if has_positionals else not following.startswith("-")):
                    equals, value = "=", following
                    next(indices)  # skips the value
                form = self._flag_form(name, value) if equals else name
                current.append(form)
            if with_dashes(given) != name:
                self.warn(f"{given} is called {form} {SINCE}")
            elif equals and name.startswith("--no-"):
                self.warn(f"{given} {value} is written {form} {OLD_FORM}")
        return current

    def _flag_form(self, name: str, value: str) -> str:
        """Returns the form of a flag that means the same as `name` followed by `value`."""
        try:
            return name if boolean(value) else opposite(name)
        except argparse.ArgumentTypeError as error:
            self.error(f"argument {name}: {error}")

    def warn(self, message: str) -> None:
        """Prints one line on standard error."""
        print(f"{self.prog}: warning: {message}", file=sys.stderr)

    def error(self, message: str) -> NoReturn:
        """Exits with status 2 and the message, which also names similar options for unknown ones."""
        options = [name for name in self._option_string_actions if name.startswith("--")]
        unknown = message.partition("unrecognized arguments: ")[2].split()
        for argument in unknown:
            close = difflib.get_close_matches(argument.split("=")[0].replace("_", "-"), options, n=1)
            if close:
                message += f" (did you mean {close[0]}?)"
        self.exit(2, f"{self.prog}: {message}\n{self.prog}: see --help for the options\n")


def with_dashes(name: str) -> str:
    """Returns an option's name, with or without leading dashes, in the form that parsers know."""
    return "--" + name.removeprefix("--").replace("_", "-")


def current_option(name: str, known: OptionStrings) -> str | None:
    """Returns the option in `known` that `name` means, which may be a name in OLD_OPTIONS; None if there is none."""
    if not name.startswith("--") or len(name) < 3:
        return None
    dashed = with_dashes(name)
    return next((current for current in (dashed, OLD_OPTIONS.get(dashed, "")) if current in known), None)


def opposite(name: str) -> str:
    """Returns `--no-x` for the flag `--x`, and `--x` for `--no-x`."""
    return f"--{name[5:]}" if name.startswith("--no-") else f"--no-{name[2:]}"


class SubCommands(argparse._SubParsersAction):
    """Subparsers that reject options given before the subcommand's name, because argparse would lose them."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Stores the command; an error for options before it, because argparse would forget them."""
        for action in parser._actions:
            if action.dest != self.dest and getattr(namespace, action.dest, action.default) != action.default:
                parser.error(f"{action.option_strings[0]} must come after {values[0]}")
        super().__call__(parser, namespace, values, option_string)


class ConfigFile(argparse.Action):
    """Action of --config FILE, which reads options by their names from YAML.

    Options on the command line, before or after --config, take precedence over the file.
    """

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Sets the file's options that are still at their default, so that the command line takes precedence.

        Values are parsed as on the command line. Errors name file, line and the nearest option, and exit with status 2.
        """
        import yaml

        try:
            node = yaml.compose(Path(values).expanduser().read_text(encoding="utf-8"), yaml.SafeLoader)
        except OSError as error:
            parser.error(f"--config {values}: cannot be read: {error.strerror}")
        except yaml.YAMLError as error:
            parser.error(f"--config {values}: is not valid YAML: {str(error).splitlines()[0]}")
        if node is not None and not isinstance(node, yaml.MappingNode):
            parser.error(f"--config {values}: must be a mapping of options to values")
        for key, value in node.value if node is not None else ():
            location = f"--config {values}, line {key.start_mark.line + 1}"
            given = with_dashes(str(key.value))
            name = current_option(given, parser._option_string_actions) or ""
            action = parser._option_string_actions.get(name)
            if action is None or action is self or action.dest == "help":
                close = difflib.get_close_matches(given, list(parser._option_string_actions), n=1)
                parser.error(
                    f"{location}: unknown option {key.value!r}"
                    + (f" (did you mean {close[0][2:]!r}?)" if close else "")
                )
            texts = [item.value for item in value.value] if isinstance(value, yaml.SequenceNode) else [value.value]
            parsed = [self._parse_value(parser, action, name, text, f"{location}: {key.value}") for text in texts]
            if given != name or given.startswith("--no-"):  # an old name, or `no_x: true` for `x: false`
                truth = f": {str(parsed[-1]).lower()}" if isinstance(action, argparse.BooleanOptionalAction) else ""
                new_key = action.dest if truth else name[2:].replace("-", "_")
                parser.warn(f"{location}: {key.value} is written {new_key}{truth} {OLD_FORM}")
            if getattr(namespace, action.dest, None) == action.default:  # else the command line has set it
                setattr(namespace, action.dest, parsed if isinstance(action, argparse._AppendAction) else parsed[-1])

    @staticmethod
    def _parse_value(parser: Any, action: Any, name: str, text: Any, location: str) -> Any:
        """Parses one value with the option's own type and choices; exits with an error that names its line."""
        if not isinstance(text, str):
            parser.error(f"{location} must be a value or a list of values")
        is_flag = isinstance(action, argparse.BooleanOptionalAction)
        try:
            parsed = boolean(text) if is_flag else action.type(text) if action.type else text
        except (argparse.ArgumentTypeError, ValueError) as error:
            parser.error(f"{location}: {error}")
        if action.choices is not None and parsed not in action.choices:
            parser.error(f"{location} must be one of {', '.join(action.choices)}, found {text!r}")
        return not parsed if is_flag and name.startswith("--no-") else parsed  # `no_x: true` means that x is false


BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def boolean(text: str) -> bool:
    """Parses a boolean option value such as the true of `--force_think true`."""
    if text.lower() not in BOOLEANS:
        raise argparse.ArgumentTypeError(f"must be true or false, found {text!r}")
    return BOOLEANS[text.lower()]


def positive(text: str) -> int:
    """Parses a whole number of at least 1."""
    return _at_least(1, text)


def non_negative(text: str) -> int:
    """Parses a whole number of at least 0."""
    return _at_least(0, text)


def _at_least(minimum: int, text: str) -> int:
    """Parses a whole number of at least `minimum`; argparse prints the error."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, found {text!r}") from None
    if value < minimum:
        raise argparse.ArgumentTypeError(f"must be at least {minimum}, found {value}")
    return value


UNIT_BYTES = {
    "": 1,
    "K": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "KI": 1 << 10,
    "MI": 1 << 20,
    "GI": 1 << 30,
    "TI": 1 << 40,
}


def size(text: str) -> int:
    """Parses a size in bytes: 24G (10^9 bytes each), 22.5GiB (2^30 bytes each), or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if match is None or match[2] not in UNIT_BYTES or not float(match[1]):
        raise argparse.ArgumentTypeError(f"must be a size in bytes such as 24G or 22.5GiB, found {text!r}")
    return int(float(match[1]) * UNIT_BYTES[match[2]])


def sizes(text: str) -> list[int]:
    """Parses sizes separated by commas: 24G,24G."""
    return [size(part) for part in text.split(",")]


def rate(text: str) -> float:
    """Parses a bandwidth in GB/s: more than 0 and below 1000000."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, found {text!r}") from None
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"must be more than 0 and below 1000000 GB/s, found {text}")
    return value


def tokens(text: str) -> int:
    """Parses a number of tokens: 32K is 32768."""
    return positive(text[:-1]) * 1024 if text[-1:] in ("k", "K") else positive(text)


def int_list(text: str) -> list[int]:
    """Parses positive integers separated by commas: 512,2048."""
    return [positive(part) for part in text.split(",")]


def flag(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup, name: str, help: str, default: bool = False
) -> None:
    """Adds a boolean option and its opposite, `--no-...`; `Parser` accepts true or false after each."""
    parser.add_argument(name, action=argparse.BooleanOptionalAction, default=default, help=help)


def debug_option(parser: argparse.ArgumentParser) -> None:
    """Adds --debug, which every command has."""
    flag(parser, "--debug", help="show the traceback when the command fails")


def threads_option(group: argparse._ArgumentGroup) -> None:
    """Adds --threads, with KTransformers' name for it, --cpu-infer, as the main one, so that its command lines work."""
    group.add_argument(
        "--cpu-infer",
        "--threads",
        "-t",
        dest="threads",
        type=positive,
        metavar="N",
        help="CPU worker threads (default: usable physical cores)",
    )


def speculation_options(group: argparse._ArgumentGroup) -> None:
    """Adds the options of speculative decoding, --speculative and --draft-tokens, for commands with an engine."""
    group.add_argument(
        "--speculative",
        choices=("mtp", "prompt_lookup"),
        help="speculative decoding: draft several tokens and verify them in one forward; the output does not change."
        " mtp drafts with the model's multi-token prediction layer, prompt_lookup copies what followed the same tokens"
        " earlier in the text (default: off)",
    )
    group.add_argument(
        "--draft-tokens",
        type=positive,
        default=8,
        metavar="N",
        help="max draft tokens per forward; fewer are drafted where their measured cost and acceptance rate make that"
        " faster (default 8)",
    )


def chunk_size_option(group: argparse._ArgumentGroup, default: str) -> None:
    """Adds --max-num-batched-tokens (vLLM's name) and --chunk-size, KTransformers' name for the same option.

    Args:
        default: the command's default, as the help text describes it.
    """
    group.add_argument(
        "--max-num-batched-tokens",
        "--chunk-size",
        dest="chunk_size",
        type=positive,
        metavar="N",
        help=f"max prompt tokens of one prefill step while no request is decoding (default: {default})",
    )


def batching_options(group: argparse._ArgumentGroup) -> None:
    """Adds --max-num-batched-tokens and --max-itl-ms, which limit the prompt tokens of an engine's step."""
    chunk_size_option(group, "2048, up to 8192 after a long context, fewer if memory is short")
    group.add_argument(
        "--max-itl-ms",
        type=positive,
        default=500,
        metavar="MS",
        help="inter-token latency target in milliseconds: while requests are decoding, a step prefills only as many"
        " prompt tokens as take MS at the measured rate, but at least 64 (default 500)",
    )


def graphs_option(group: argparse._ArgumentGroup) -> None:
    """Adds --cuda-graphs, for commands that create an engine."""
    flag(
        group,
        "--cuda-graphs",
        default=True,
        help="with all layers on one GPU, capture a CUDA graph after loading, which launches the kernels of a decode"
        " step as one; --no-cuda-graphs launches each separately",
    )


def lora_option(parser: argparse.ArgumentParser, when_repeated: str) -> argparse._ArgumentGroup:
    """Adds --lora and vLLM's name for it, --lora-modules, in a new group; returns the group, for further options.

    Args:
        when_repeated: the effect of several adapters, for the help text.
    """
    group = parser.add_argument_group("adapters")
    group.add_argument(
        "--lora",
        "--lora-modules",
        dest="lora",
        action="append",
        metavar="[NAME=]PATH[=SCALE]",
        help="LoRA adapter: a PEFT folder with adapter_config.json, or a llama.cpp GGUF file;"
        f" may be repeated: {when_repeated}",
    )
    return group


def model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the model and its placement, under their names here and in KTransformers.

    `infer_model` infers --model where only --weights is given.
    """
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        "--model-path",
        dest="model",
        metavar="DIR",
        help="Hugging Face folder or hub id (config.json, tokenizer), or a GGUF file, which needs no folder",
    )
    group.add_argument(
        "--weights",
        "--gguf-path",
        dest="weights",
        metavar="PATH",
        help="GGUF file (of a split one the first file), folder of a GGUF file, or safetensors"
        " (default: the weights in --model)",
    )
    group.add_argument(
        "--rules",
        "--optimize-config-path",
        dest="rules",
        metavar="FILE",
        help="path of a rule file, or the name of a shipped one (default: the shipped one for the architecture)",
    )
    group.add_argument(
        "--quantize",
        default="auto",
        metavar="TYPE",
        help="quantize float weights while loading, to int8, int4 (groups of 128 weights), int4g64 or int4g32"
        " (default auto: keep their types)",
    )
    group.add_argument(
        "--quantize-experts",
        metavar="TYPE",
        help="like --quantize, for the weights of routed experts (default: as --quantize)",
    )
    group.add_argument(
        "--num-experts-per-tok",
        type=positive,
        metavar="K",
        help="routed experts per token, fewer than the model's own number: faster, less exact (default: the model's)",
    )
    group.add_argument(
        "--defer-experts",
        type=int,
        default=0,
        metavar="D",
        help="add the outputs of each token's D experts of the lowest weights one layer later, so that a GPU and the"
        " CPU do not wait for each other: faster with both, less exact (default 0)",
    )
    group.add_argument(
        "--kv-dtype",
        "--kv-cache-dtype",
        dest="kv_dtype",
        default="auto",
        metavar="TYPE",
        help="KV cache type: f16, bf16, f32, q8_0 (half the memory of f16; f16 on a GPU) or fp8 (half the memory of"
        " f16 on a GPU; q8_0 on the CPU) (default f16)",
    )
    group.add_argument(
        "--packed-cache-dir",
        metavar="DIR",
        help="cache packed weights in DIR: the first start writes them, as many bytes as they take in memory, later"
        " starts only map the files (default: pack at each start)",
    )
    flag(group, "--trust-remote-code", help="run Python code from the model's repository (default: never)")
    flag(
        group,
        "--self-test",
        default=True,
        help="after loading, compute a few tokens both in one forward and through the KV cache, and exit with status 4"
        " if the results differ; --no-self-test skips this",
    )
    placement_options(parser)


def placement_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that place modules on devices: --device and its exceptions."""
    group = parser.add_argument_group("placement")
    group.add_argument(
        "--device",
        metavar="DEVICE",
        help="device of everything but the routed experts: cpu, cuda, cuda:N, or several GPUs that split the layers"
        " (cuda:0,cuda:1) (default: the rule file's, else cpu)",
    )
    group.add_argument(
        "--moe-device",
        metavar="DEVICE",
        help="device of the routed experts: cpu (all of its NUMA nodes), numa (a synonym of cpu), cuda or cuda:N"
        " (default cpu)",
    )
    group.add_argument(
        "--gpu-experts",
        type=non_negative,
        metavar="N",
        help="routed experts per layer to place on the layer's GPU; the others stay on the CPU and both compute in"
        " parallel (default: the rule file's number, else 0)",
    )
    group.add_argument(
        "--stream-experts-min-tokens",
        metavar="N",
        help="for prompts of at least N tokens, copy experts in CPU memory to their layer's GPU and compute them"
        " there: a number, auto (the number from which that is faster) or off (default: the rule file's, else auto)",
    )
    group.add_argument(
        "--shared-expert-device",
        metavar="DEVICE",
        help="device of the shared experts (default: as --device)",
    )
    group.add_argument(
        "--devices",
        action="append",
        type=module_device,
        metavar="MODULES=DEVICE",
        help="device of modules by name, as in the devices map of a rule file: 'layers 0-29=cuda:1'; may be repeated",
    )


def module_device(text: str) -> tuple[str, str]:
    """Parses an entry of the devices map: MODULES=DEVICE."""
    key, equals, value = text.rpartition("=")
    if not equals or not key or not value:
        raise argparse.ArgumentTypeError(f"must be MODULES=DEVICE, found {text!r}")
    return key.strip(), value.strip()


def placement_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the placement arguments of ktx.load and ktx.plan."""
    return {
        "device": args.device,
        "moe_device": args.moe_device,
        "shared_expert_device": args.shared_expert_device,
        "gpu_experts": args.gpu_experts,
        "devices": dict(args.devices) if args.devices else None,
    }


def load_arguments(args: argparse.Namespace, engine: bool = False) -> dict[str, Any]:
    """Returns the arguments of ktx.load, except model, weights and rules, from the parsed model and placement options.

    Args:
        engine: the caller creates an engine of the model, which runs the self-test instead of ktx.load.
    """
    return {
        "quantize": args.quantize,
        "quantize_experts": args.quantize_experts,
        "num_experts_per_tok": args.num_experts_per_tok,
        "defer_experts": args.defer_experts,
        "kv_dtype": args.kv_dtype,
        "packed_cache_dir": args.packed_cache_dir,
        "trust_remote_code": args.trust_remote_code,
        "stream_experts_min_tokens": args.stream_experts_min_tokens,
        "self_test": args.self_test and ("engine" if engine else True),
        "lora": getattr(args, "lora", None),
        **placement_kwargs(args),
    }


AddArguments = Callable[[argparse.ArgumentParser], None]  # a command's add_arguments, or a part of it


def options_of(*add_functions: AddArguments) -> dict[str, argparse.Action]:
    """Returns the options that functions add to a parser, keyed by their name in the namespace."""
    parser = argparse.ArgumentParser(add_help=False)
    for add in add_functions:
        add(parser)
    return {action.dest: action for action in parser._actions if action.option_strings}


def reject_options(args: argparse.Namespace, options: Mapping[str, argparse.Action], reason: str) -> None:
    """Rejects options that this run of the command does not use, because ignoring them silently would mislead a user.

    Args:
        options: the options to reject, by their name in the namespace.
        reason: the end of the message, after the option's name.

    Raises:
        UsageError: one of the options is given.
    """
    for dest, action in options.items():
        if getattr(args, dest, action.default) != action.default:
            option = next((name for name in action.option_strings if name.startswith("--")), action.option_strings[0])
            if isinstance(action, argparse.BooleanOptionalAction) and action.default:
                option = opposite(option)
            raise UsageError(f"{option} {reason}")


def infer_model(args: argparse.Namespace) -> bool:
    """Sets `args.model` from --weights where --model is not given, because a GGUF file or a complete folder is enough.

    Returns:
        Whether a model is given; False when neither option is.

    Raises:
        BadFile: --weights does not exist.
        UsageError: --weights does not include the model's config.json and tokenizer.
    """
    if args.model is not None or not args.weights:
        return args.model is not None
    path = Path(args.weights).expanduser()
    if not path.exists():
        raise BadFile(f"{args.weights}: no such file or folder; `ktx download` fetches a model from a hub")
    path = path if (path / "config.json").exists() else first_gguf(path)
    if is_gguf(path) or (path / "config.json").exists():
        args.model = str(path)
        return True
    raise UsageError(
        f"--weights {args.weights} needs --model: the Hugging Face folder of this model (config.json, tokenizer)"
    )


def first_gguf(path: Path) -> Path:
    """Returns the first GGUF file of a folder, or `path` itself if it is no folder or has none."""
    return next(iter(ggufs_in(path)), path) if path.is_dir() else path


def use_demo_model(args: argparse.Namespace) -> None:
    """Sets the bundled demo model in the arguments: its GGUF file, or its safetensors if the MTP layer is needed."""
    import ktx.demo

    needs_mtp = getattr(args, "speculative", None) == "mtp"
    args.model = str(ktx.demo.path())
    args.weights = str(ktx.demo.safetensors() if needs_mtp else ktx.demo.gguf())


def infer_model_or_demo(args: argparse.Namespace) -> None:
    """Infers --model as `infer_model` does; without a model it sets the demo model and prints a note.

    The note goes to standard error, so that tables, JSON and answers on standard output stay as they are.
    """
    if not infer_model(args):
        use_demo_model(args)
        print(
            "no --model given: using the bundled demo model, which is small and answers only questions about ktx",
            file=sys.stderr,
            flush=True,
        )


def require_model(args: argparse.Namespace) -> None:
    """Raises UsageError when neither --model nor --weights is given."""
    if not infer_model(args):
        raise UsageError(
            "no model is given: give --model DIR (a Hugging Face folder or hub id), or --weights FILE.gguf"
        )
