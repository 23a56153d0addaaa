"""ktx chat: chat with a model in the terminal, or answer messages from standard input."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ktx.cli.arguments import (
    batching_options,
    flag,
    graphs_option,
    infer_model_or_demo,
    load_arguments,
    lora_option,
    model_options,
    positive,
    speculation_options,
    threads_option,
)

SUMMARY = "chat with a model in the terminal"
EPILOG = (
    "Without --model the bundled demo model answers. If standard input is no terminal, each of its lines is one"
    " message. Example: ktx chat --model DIR --weights FILE.gguf -p 'What is a rule file?'"
)

DEFAULT_MAX_CONTEXT = 1 << 15  # tokens of a conversation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `ktx chat` to its parser."""
    parser.epilog = EPILOG
    model_options(parser)
    lora_option(parser, "the sum of all adapters is applied")
    group = parser.add_argument_group("running")
    threads_option(group)
    batching_options(group)
    group.add_argument(
        "--max-context",
        type=positive,
        metavar="N",
        help="max tokens of a conversation, prompts and answers (default: the model's context, at most 32768)",
    )
    speculation_options(group)
    graphs_option(group)
    output = parser.add_argument_group("answers")
    output.add_argument(
        "--max-new-tokens", type=positive, default=1000, metavar="N", help="max tokens of an answer (default 1000)"
    )
    output.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="sampling temperature; 0 always takes the most probable token (default: the one of the model's"
        " generation_config.json, else 0)",
    )
    output.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="sample from the most probable tokens whose probabilities add up to P (default: the model's, else all)",
    )
    output.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help="sample from the K most probable tokens (default: the model's, else all)",
    )
    output.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="drop tokens less probable than P times the most probable one (default: none)",
    )
    output.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="R",
        help="above 1, make tokens that have already occurred less probable (default 1)",
    )
    output.add_argument(
        "--seed", type=int, metavar="N", help="seed of sampling, for repeatable answers (default: random)"
    )
    output.add_argument("--system", metavar="TEXT", default="", help="system message (default: none)")
    flag(output, "--force-think", help="begin each answer with <think>, so that the model reasons before it answers")
    flag(output, "--fold", help="hide the reasoning and show only its length in characters")
    input_group = parser.add_argument_group("input")
    input_group.add_argument(
        "-p",
        "--prompt",
        metavar="TEXT",
        help="answer this one message and exit; only the answer is written to standard output",
    )
    input_group.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="file whose text is sent as the message when the first line entered is empty, or at once when there is"
        " no interactive terminal and no piped input",
    )


def run(args: argparse.Namespace) -> int:
    """Loads the model and chats; returns exit status 0 unless an error occurs before the first turn."""
    from ktx.chat.conversation import Conversation
    from ktx.chat.reading import read_text
    from ktx.chat.render import Printer, print_note
    from ktx.chat.terminal import Chat, has_terminal
    from ktx.engine.chat_session import Session

    check_sampling(args)
    infer_model_or_demo(args)
    import ktx

    model, _ = ktx.load(
        args.model,
        args.weights,
        args.rules,
        threads=args.threads,
        mtp=args.speculative == "mtp",
        **load_arguments(args, engine=True),
    )
    print_note(loaded_line(model, args.model))
    model_limit = getattr(model.config, "max_position_embeddings", None) or DEFAULT_MAX_CONTEXT
    context = args.max_context or min(model_limit, DEFAULT_MAX_CONTEXT)
    engine_options = {
        "chunk_size": args.chunk_size,
        "max_itl_ms": args.max_itl_ms,
        "speculative": args.speculative,
        "draft_tokens": args.draft_tokens,
        "cuda_graphs": args.cuda_graphs,
    }
    with model.ktx.engine(max_batch_size=1, kv_cache_tokens=context, max_context=context, **engine_options) as engine:
        conversation = Conversation(Session(engine), sampling_of(args, model), args.system, args.force_think)
        chat = Chat(conversation, Printer(sys.stdout, args.fold), engine, prompt_file=args.prompt_file)
        if args.prompt is not None:
            chat.send(args.prompt)
        elif has_terminal():
            chat.bandwidth = _measure_bandwidth()
            print_note("/help lists the commands, Ctrl-C stops an answer, /exit ends the chat")
            chat.interactive()
        elif args.prompt_file and sys.stdin.isatty():
            chat.send(read_text(args.prompt_file))
        else:
            chat.piped(sys.stdin)
    return 0


def loaded_line(model: Any, name: str) -> str:
    """Returns the line printed after loading: model, size, kernels, threads, load time."""
    from ktx.hardware import format_bytes

    info = model.ktx
    return (
        f"{name}: {format_bytes(info.nbytes)} of weights, {info.isa} kernels, {info.threads} threads,"
        f" loaded in {info.seconds:.1f} s ({info.load_speed:.2f} GB/s)"
    )


def _measure_bandwidth() -> float:
    """Returns the read bandwidth in GB/s, the limit of decoding, with which the chat compares its speed."""
    from ktx.kernels.cpu import ops
    from ktx.kernels.microbench import read_bandwidth

    return read_bandwidth(ops.threads()).gb_s


def check_sampling(args: argparse.Namespace) -> None:
    """Raises UsageError for a sampling parameter out of range, before minutes are spent on loading."""
    from ktx.engine.sampler import SamplingParams

    SamplingParams(**_sampling_options(args))


def _sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_new_tokens")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def sampling_of(args: argparse.Namespace, model: Any) -> Any:
    """Returns the sampling parameters: those of the command line, then the model's generation_config.json.

    The latter is used only if it sets do_sample.
    """
    from ktx.engine.sampler import SamplingParams

    generation_config = model.generation_config
    defaults = (
        {
            name: getattr(generation_config, name)
            for name in ("temperature", "top_p", "top_k")
            if getattr(generation_config, name, None) is not None
        }
        if generation_config.do_sample
        else {}
    )
    return SamplingParams(**(defaults | _sampling_options(args)))
