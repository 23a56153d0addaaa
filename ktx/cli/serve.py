"""ktx serve: an OpenAI-compatible server, which Anthropic's and Ollama's clients understand too."""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ktx.cli import serve_ray
from ktx.cli.arguments import (
    Settings,
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
from ktx.errors import BadFile, UsageError
from ktx.utils.versions import install

SUMMARY = "serve a model over HTTP"
EPILOG = "Without --model the bundled demo model answers. Keys may also stand in the environment: KTX_API_KEY."
LEAST_TOKENS = 64
MOST_KEPT = 1_000_000
PACKAGES = ("fastapi", "uvicorn", "sse_starlette", "prometheus_client", "llguidance")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "--config",
        action=Settings,
        metavar="FILE",
        help="YAML file with these options by their names; those given here count more",
    )
    model_options(parser)
    adapters = lora_option(parser, "each answers requests whose model is its name (default: the folder's or file's)")
    adapters.add_argument(
        "--lora-dir",
        metavar="DIR",
        help="let requests load adapters below DIR, and unload any, by vLLM's /v1/load_lora_adapter and /v1/unload_lora_adapter (default: they may not)",
    )
    running_options(parser)
    say = parser.add_argument_group("answers")
    say.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="longest answer of a request that names no number (default: what the context leaves)",
    )
    say.add_argument(
        "--temperature", type=float, metavar="T", help="of requests that name none (default: the model's own, else 1)"
    )
    say.add_argument("--top-p", type=float, metavar="P", help="the same for top_p")
    say.add_argument("--chat-template", metavar="FILE", help="a Jinja chat template in the place of the model's own")
    flag(say, "--force-think", help="begin each answer with <think>")
    say.add_argument(
        "--keep-responses",
        type=int,
        metavar="N",
        help="newest answers of /v1/responses that are kept in memory for requests that go on from them (default 1000; 0 with --ray, whose replicas share none)",
    )
    net = parser.add_argument_group("network")
    net.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (default 127.0.0.1: this machine alone)"
    )
    net.add_argument("--port", type=int, default=10002, metavar="N", help="0 takes any free one (default 10002)")
    net.add_argument(
        "--model-name",
        action="append",
        metavar="NAME",
        help="name in the API (default: the folder's); several times: aliases",
    )
    net.add_argument("--api-key", action="append", metavar="KEY", help="ask for this key; several times: any of them")
    net.add_argument("--api-key-file", metavar="FILE", help="keys, one a line")
    flag(net, "--allow-unauthenticated", help="listen on other addresses than this machine's own without a key")
    net.add_argument(
        "--allowed-hosts",
        action="append",
        metavar="NAME",
        help="a name that this server goes by, for requests without keys",
    )
    net.add_argument(
        "--cors-origins",
        action="append",
        metavar="ORIGIN",
        help="web pages that may ask, such as https://chat.example; * is all",
    )
    serve_ray.add_options(parser)
    log = parser.add_argument_group("log")
    log.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info", help="(default info)"
    )
    log.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="a line or a JSON object for each event (default text)",
    )
    flag(log, "--hide-input", default=True, help="false: write prompts to the log (default true)")


def running_options(parser: argparse.ArgumentParser, batch: int | str = 4) -> None:
    """How the engine runs, for every command that starts a server. `batch`: requests at once, or words for what they depend on."""
    run = parser.add_argument_group("running")
    threads_option(run)
    run.add_argument(
        "--max-batch-size",
        type=positive,
        default=batch if isinstance(batch, int) else None,
        metavar="N",
        help=f"requests computed at once (default {batch})",
    )
    step_options(run)
    run.add_argument(
        "--cache-lens",
        type=positive,
        default=32768,
        metavar="N",
        help="tokens whose keys and values are kept, of all requests together (default 32768)",
    )
    run.add_argument(
        "--max-context",
        type=positive,
        metavar="N",
        help="most tokens of one request (default: what the model and --cache-lens allow)",
    )
    run.add_argument(
        "--max-queue",
        type=positive,
        default=256,
        metavar="N",
        help="requests that may wait; more are told to come again (default 256)",
    )
    flag(run, "--no-prefix-cache", help="compute every prompt anew")
    run.add_argument(
        "--prefix-cache-dir",
        metavar="DIR",
        help="keep computed prompts in DIR, so that the next start knows them (what was said can be read from them)",
    )
    run.add_argument(
        "--prefix-cache-gb", type=float, default=16.0, metavar="GB", help="most of DIR, oldest go first (default 16)"
    )
    speculation_options(run)
    graphs_option(run)
    run.add_argument(
        "--backend-type",
        choices=("balance_serve", "ktransformers", "scripted"),
        default="balance_serve",
        help="scripted: answers come from --script, for tests of clients",
    )
    run.add_argument(
        "--script",
        metavar="FILE",
        help="with --backend-type scripted: JSON list of {match, text}; without it prompts are repeated",
    )
    run.add_argument(
        "--pace", type=float, default=0.0, metavar="SECONDS", help="with --backend-type scripted: seconds a token"
    )


def run(args: argparse.Namespace) -> int:
    """Serves until a signal; exit status 0 then."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"ktx serve needs {', '.join(missing)}: {install('serve')}")
    from ktx.server.auth import AccessPolicy
    from ktx.server.gc_tuning import freeze_gc
    from ktx.server.log import set_up

    keys = keys_of(args)
    check_exposure(args, keys)
    check_settings(args)
    serve_ray.check(args)
    set_up(args.log_level, args.log_format)
    from ktx.server.app import make_app
    from ktx.server.run import listen, serve
    from ktx.server.state import ServerState

    known = named_model(args)
    names = tuple(args.model_name or [_name(args.model) if known else "ktx-demo"])
    if not known:
        import ktx.demo

        args.model = str(ktx.demo.path())
        args.weights = str(ktx.demo.safetensors() if args.speculative == "mtp" else ktx.demo.gguf())
    adapters = adapter_names(args, names)
    hosts = (*(args.allowed_hosts or ()), args.host)
    access = AccessPolicy(keys, tuple(hosts), tuple(origin.rstrip("/") for origin in args.cors_origins or ()))
    if args.ray:
        return serve_ray.serve_replicas(args, names, adapters, access, _settings(args), make_engine)
    served = ServerState(names, _settings(args), adapters)
    where = listen(args.host, args.port)
    app = make_app(served, access)
    trouble: list[BaseException] = []

    def started(end: Callable[[], None]) -> None:
        def failed(error: BaseException) -> None:
            trouble.append(error)
            end()

        address = f"[{args.host}]" if ":" in args.host else args.host
        logging.getLogger("ktx.server").info(
            "listening on http://%s:%d, loading %s", address, where.getsockname()[1], names[0]
        )
        served.load(make, failed)

    def make(served: ServerState) -> Any:
        engine = make_engine(args, served)
        freeze_gc()
        return engine

    serve(app, served, where, started)
    if trouble:
        raise trouble[0]
    return 0


def adapter_names(args: argparse.Namespace, names: tuple[str, ...]) -> tuple[str, ...]:
    """Of the LoRA adapters that are served. UsageError for one that has the model's name, and where no model is computed."""
    if not args.lora:
        return ()
    if args.backend_type == "scripted":
        raise UsageError("--lora: --backend-type scripted computes no model")
    from ktx.model.lora import wishes

    found = tuple(wish.name for wish in wishes(args.lora))
    if taken := next((name for name in found if name in names), None):
        raise UsageError(f"--lora: {taken!r} is the model's name; give another one: NAME=DIR")
    return found


def _name(path: str) -> str:
    """A folder's name, or a GGUF file's without its end."""
    last = Path(path.rstrip("/")).name
    return last.removesuffix(".gguf") or path


def _settings(args: argparse.Namespace) -> Any:
    from ktx.server.state import ServerSettings as Answers

    template = read_template(args.chat_template) if args.chat_template else None
    sampling = {name: getattr(args, name) for name in ("temperature", "top_p") if getattr(args, name) is not None}
    from ktx.engine.sampler import SamplingParams

    SamplingParams(**sampling)  # refuses what is out of range
    keep = (0 if args.ray else Answers.max_stored_responses) if args.keep_responses is None else args.keep_responses
    folder = Path(args.lora_dir).expanduser().resolve() if args.lora_dir else None
    return Answers(args.max_new_tokens, args.force_think, template, args.hide_input, sampling, keep, lora_dir=folder)


def read_template(file: str) -> str:
    """The text of a chat template. BadFile, with the line where there is one, for a file that holds none."""
    from ktx.engine.template import DEFAULT, check_templates

    where = f"--chat-template {file}"
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise BadFile(f"{where}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise BadFile(f"{where}, line {line}: is no UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise BadFile(f"{where}: is empty")
    check_templates({DEFAULT: text}, where)
    return text


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "max_batch_size": args.max_batch_size,
        "chunk_size": args.chunk_size,
        "max_itl_ms": args.max_itl_ms,
        "cache_lens": args.cache_lens,
        "max_context": args.max_context,
        "max_queue": args.max_queue,
        "prefix_cache": not args.no_prefix_cache,
        "prefix_cache_dir": args.prefix_cache_dir,
        "prefix_cache_gb": args.prefix_cache_gb,
        "speculative": args.speculative,
        "draft_tokens": args.draft_tokens,
        "cuda_graphs": not args.no_cuda_graphs,
    }


def make_engine(args: argparse.Namespace, served: Any) -> Any:
    """The engine that the options ask for; `served` is told how much is read, and what memory can."""
    return _scripted(args) if args.backend_type == "scripted" else _engine(args, served)


def _engine(args: argparse.Namespace, served: Any) -> Any:
    import ktx
    from ktx.kernels.cpu import pool_size
    from ktx.kernels.microbench import free_read_bandwidth

    reading = free_read_bandwidth(pool_size(args.threads))
    served.bandwidth = reading and reading.gb_s
    model, _ = ktx.load(
        args.model,
        args.weights,
        args.rules,
        threads=args.threads,
        progress=served.progress,
        mtp=args.speculative == "mtp",
        **load_options(args, engine=True),
    )
    logging.getLogger("ktx.server").info(
        "loaded in %.1f s, %s kernels, %d threads", model.ktx.seconds, model.ktx.isa, model.ktx.threads
    )
    model.ktx.use_lora()  # requests name theirs
    return model.ktx.engine(**_options(args))


def _scripted(args: argparse.Namespace) -> Any:
    from ktx.engine.engine import Options
    from ktx.engine.scripted import read_script, scripted_engine
    from ktx.loader.meta_model import read_config, read_tokenizer
    from ktx.weights.base import open_weights
    from ktx.weights.gguf_files import is_gguf

    source: Any = open_weights(args.model, read_config(args.model)) if is_gguf(Path(args.model)) else None
    tokenizer = read_tokenizer(args.model, source, args.trust_remote_code)
    return scripted_engine(tokenizer, Options(**_options(args)), read_script(args.script, tokenizer), args.pace)


def keys_of(args: argparse.Namespace) -> tuple[str, ...]:
    """From the command line, a file and the environment. UsageError for one that a header cannot hold."""
    keys = list(args.api_key or ())
    if args.api_key_file:
        try:
            keys += [
                line.strip()
                for line in Path(args.api_key_file).expanduser().read_text(encoding="utf-8").splitlines()
                if line.strip()
            ]
        except OSError as error:
            raise BadFile(f"--api-key-file {args.api_key_file}: cannot be read: {error.strerror}") from error
        if not keys:
            raise BadFile(f"--api-key-file {args.api_key_file}: holds no key")
    keys += [key for key in os.environ.get("KTX_API_KEY", "").split() if key]
    if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise UsageError("a key is made of printable ASCII without spaces")
    return tuple(dict.fromkeys(keys))


def check_exposure(args: argparse.Namespace, keys: tuple[str, ...]) -> None:
    """UsageError when everybody who reaches this machine could use the server, unless that was said to be meant."""
    try:
        own = ipaddress.ip_address(args.host).is_loopback
    except ValueError:
        own = args.host == "localhost"
    if not own and not keys and not args.allow_unauthenticated:
        raise UsageError(
            f"--host {args.host} without a key would let everybody in who reaches this machine: give --api_key or --api_key_file, or say --allow_unauthenticated"
        )


def check_settings(args: argparse.Namespace) -> None:
    if not 0 <= args.port < 1 << 16:
        raise UsageError(f"--port {args.port}: must be from 0 to 65535")
    if args.keep_responses is not None and not 0 <= args.keep_responses <= MOST_KEPT:
        raise UsageError(f"--keep-responses {args.keep_responses}: must be from 0 to {MOST_KEPT}")
    if args.keep_responses and args.ray:
        raise UsageError(
            f"--keep-responses {args.keep_responses}: replicas (--ray) share no answers; leave it out, or give 0"
        )
    if args.lora_dir:
        if args.ray:
            raise UsageError(
                "--lora-dir: replicas (--ray) share no adapters that requests load; give --lora at the start"
            )
        if args.backend_type == "scripted":
            raise UsageError("--lora-dir: --backend-type scripted computes no model")
        if not Path(args.lora_dir).expanduser().is_dir():
            raise BadFile(f"--lora-dir {args.lora_dir}: no such folder")
    if args.cache_lens < LEAST_TOKENS:
        raise UsageError(f"--cache-lens {args.cache_lens}: must be at least {LEAST_TOKENS}")
    if args.script and args.backend_type != "scripted":
        raise UsageError("--script needs --backend-type scripted")
    if args.pace < 0 or args.pace > 60:
        raise UsageError(f"--pace {args.pace}: must be from 0 to 60")
