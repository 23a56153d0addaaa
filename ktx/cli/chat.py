"""ktx chat: talk to a model."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ktx.cli.arguments import (
    flag,
    graphs_option,
    load_options,
    lora_option,
    model_options,
    named_model,
    positive,
    speculation_options,
    step_options,
    threads_option,
)

SUMMARY = "talk to a model in the terminal"
EPILOG = (
    "Without --model the bundled demo model answers. Without a terminal each line of standard input is one message."
)

CONTEXT = 1 << 15  # tokens of a conversation, where nobody says how many


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    model_options(parser)
    lora_option(parser, "their sum counts")
    run = parser.add_argument_group("running")
    threads_option(run)
    step_options(run)
    run.add_argument(
        "--max-context",
        type=positive,
        metavar="N",
        help="most tokens of a conversation (default: what the model allows, at most 32768)",
    )
    speculation_options(run)
    graphs_option(run)
    say = parser.add_argument_group("answers")
    say.add_argument("--max-new-tokens", type=positive, default=1000, metavar="N", help="longest answer (default 1000)")
    say.add_argument(
        "--temperature", type=float, metavar="T", help="0 takes the likeliest token (default: the model's own, else 0)"
    )
    say.add_argument("--top-p", type=float, metavar="P", help="keep the likeliest tokens up to this share")
    say.add_argument("--top-k", type=int, metavar="K", help="keep the K likeliest tokens")
    say.add_argument(
        "--min-p", type=float, metavar="P", help="keep tokens at least this likely, relative to the likeliest"
    )
    say.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1: repeat less")
    say.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
    say.add_argument("--system", metavar="TEXT", default="", help="system message")
    flag(say, "--force-think", help="begin each answer with <think>")
    flag(say, "--fold", help="show thinking as a count only")
    text = parser.add_argument_group("input")
    text.add_argument(
        "-p",
        "--prompt",
        metavar="TEXT",
        help="answer this one message and leave; the answer alone goes to standard output",
    )
    text.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="sent by an empty first line, or at once when there is no terminal and no input",
    )


def run(args: argparse.Namespace) -> int:
    """Loads the model and chats; exit status 0 unless something was wrong before the first turn."""
    from ktx.chat.conversation import Conversation
    from ktx.chat.reading import read_text
    from ktx.chat.render import Printer, note
    from ktx.chat.terminal import Chat, has_terminal
    from ktx.engine.chat_session import Session

    sampling_check(args)
    if not named_model(args):
        _demo(args, note)
    import ktx

    model, tokenizer = ktx.load(
        args.model,
        args.weights,
        args.rules,
        threads=args.threads,
        mtp=args.speculative == "mtp",
        **load_options(args, engine=True),
    )
    note(first_line(model, args.model))
    limit = getattr(model.config, "max_position_embeddings", None) or CONTEXT
    context = args.max_context or min(limit, CONTEXT)
    steps = {
        "chunk_size": args.chunk_size,
        "max_itl_ms": args.max_itl_ms,
        "speculative": args.speculative,
        "draft_tokens": args.draft_tokens,
        "cuda_graphs": not args.no_cuda_graphs,
    }
    with model.ktx.engine(max_batch_size=1, cache_lens=context, max_context=context, **steps) as engine:
        talk = Conversation(Session(engine), sampling_of(args, model), args.system, args.force_think)
        chat = Chat(talk, Printer(sys.stdout, args.fold), engine, prompt_file=args.prompt_file)
        if args.prompt is not None:
            chat.say(args.prompt)
        elif has_terminal():
            chat.bandwidth = _bandwidth()
            note("/help lists commands, Ctrl-C stops an answer, /exit leaves")
            chat.interactive()
        elif args.prompt_file and sys.stdin.isatty():
            chat.say(read_text(args.prompt_file))
        else:
            chat.piped(sys.stdin)
    return 0


def _demo(args: argparse.Namespace, note: Any) -> None:
    import ktx.demo

    args.model = str(ktx.demo.path())
    args.weights = str(ktx.demo.safetensors() if args.speculative == "mtp" else ktx.demo.gguf())
    note("no --model given: this is the bundled demo model, small and trained to answer questions about ktx only")


def first_line(model: Any, name: str) -> str:
    """What was picked: model, bytes, types, kernels, threads."""
    from ktx.hardware import format_bytes

    h = model.ktx
    return f"{name}: {format_bytes(h.nbytes)} of weights, {h.isa} kernels, {h.threads} threads, loaded in {h.seconds:.1f} s ({h.load_speed:.2f} GB/s)"


def _bandwidth() -> float:
    from ktx.kernels.cpu import ops
    from ktx.kernels.microbench import read_bandwidth

    return read_bandwidth(ops.threads()).gb_s


def sampling_check(args: argparse.Namespace) -> None:
    """Refuses a setting out of range before minutes are spent on loading."""
    from ktx.engine.sampler import SamplingParams

    SamplingParams(**_given(args))


def _given(args: argparse.Namespace) -> dict[str, Any]:
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_new_tokens")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def sampling_of(args: argparse.Namespace, model: Any) -> Any:
    """The command line's settings over the model's own (generation_config.json, when it says to sample)."""
    from ktx.engine.sampler import SamplingParams

    own = model.generation_config
    defaults = (
        {name: getattr(own, name) for name in ("temperature", "top_p", "top_k") if getattr(own, name, None) is not None}
        if own.do_sample
        else {}
    )
    return SamplingParams(**(defaults | _given(args)))
