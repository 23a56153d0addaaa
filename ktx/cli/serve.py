"""ktx serve: serve a model over HTTP, with the APIs of OpenAI, Anthropic and Ollama."""

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
    ConfigFile,
    batching_options,
    flag,
    graphs_option,
    infer_model,
    load_arguments,
    lora_option,
    model_options,
    positive,
    speculation_options,
    threads_option,
    use_demo_model,
)
from ktx.errors import BadFile, UsageError
from ktx.utils.versions import install_command

SUMMARY = "serve a model over HTTP"
EPILOG = (
    "Without --model the bundled demo model is served. API keys are also read from the environment variable"
    " KTX_API_KEY, separated by spaces. Example: ktx serve --model DIR --weights FILE.gguf --port 8080"
)
MIN_KV_CACHE_TOKENS = 64
MAX_STORED_RESPONSES = 1_000_000
REQUIRED_PACKAGES = ("fastapi", "uvicorn", "sse_starlette", "prometheus_client", "llguidance")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `ktx serve` to its parser, under its own and KTransformers' names."""
    parser.epilog = EPILOG
    parser.add_argument(
        "--config",
        action=ConfigFile,
        metavar="FILE",
        help="YAML file that maps names of these options to values; options on the command line take precedence",
    )
    model_options(parser)
    adapters = lora_option(
        parser,
        "each is used for the requests whose model is its NAME (default: the name of the folder or file)",
    )
    adapters.add_argument(
        "--lora-dir",
        metavar="DIR",
        help="let clients load adapters under DIR, and unload any adapter, through vLLM's endpoints"
        " /v1/load_lora_adapter and /v1/unload_lora_adapter (default: these endpoints are disabled)",
    )
    engine_options(parser)
    output = parser.add_argument_group("answers")
    output.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="max output tokens of a request that sets no limit (default: the rest of the context)",
    )
    output.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="temperature of requests that set none (default: the one of the model's generation_config.json, else 1)",
    )
    output.add_argument(
        "--top-p", type=float, metavar="P", help="top_p of requests that set none (default: like --temperature)"
    )
    output.add_argument("--chat-template", metavar="FILE", help="Jinja chat template to use instead of the model's own")
    flag(output, "--force-think", help="begin each output with <think>, so that the model reasons before it answers")
    output.add_argument(
        "--max-stored-responses",
        type=int,
        metavar="N",
        help="number of the newest /v1/responses results to store in memory, for requests that continue them by"
        " previous_response_id (default 1000; 0 with --ray, because replicas share no stored responses)",
    )
    network = parser.add_argument_group("network")
    network.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on (default 127.0.0.1: only this machine can connect)",
    )
    network.add_argument(
        "--port", type=int, default=10002, metavar="N", help="port to listen on, 0 for any free one (default 10002)"
    )
    network.add_argument(
        "--model-name",
        action="append",
        metavar="NAME",
        help="name of the model in the API (default: the name of its folder or file); may be repeated: aliases",
    )
    network.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help="require this key from clients; may be repeated: any of the keys (default: those in KTX_API_KEY, if any)",
    )
    network.add_argument("--api-key-file", metavar="FILE", help="file of accepted API keys, one per line")
    flag(
        network,
        "--allow-unauthenticated",
        help="allow a --host other than loopback without an API key: anyone who reaches the address can use the server",
    )
    network.add_argument(
        "--allowed-hosts",
        action="append",
        metavar="NAME",
        help="host name to accept in the Host header when no API key is set, besides --host, localhost and addresses;"
        " may be repeated",
    )
    network.add_argument(
        "--cors-origins",
        action="append",
        metavar="ORIGIN",
        help="web origin whose pages may call the API, such as https://chat.example, or * for all; may be repeated",
    )
    serve_ray.add_options(parser)
    log = parser.add_argument_group("log")
    log.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="least severe level that is logged (default info)",
    )
    log.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="format of a log record: a line of text or a JSON object (default text)",
    )
    flag(log, "--log-prompts", help="log the prompt of each request (default: prompts are not logged)")


def engine_options(parser: argparse.ArgumentParser, batch: int | str = 4) -> None:
    """Adds the engine's options, for the commands that start a server.

    Args:
        batch: default of --max-batch-size, or a text that describes it where the command computes it.
    """
    group = parser.add_argument_group("running")
    threads_option(group)
    group.add_argument(
        "--max-batch-size",
        type=positive,
        default=batch if isinstance(batch, int) else None,
        metavar="N",
        help=f"max number of requests computed in one batch; further requests wait (default {batch})",
    )
    batching_options(group)
    group.add_argument(
        "--kv-cache-tokens",
        "--cache-lens",
        type=positive,
        default=32768,
        metavar="N",
        help="KV cache capacity in tokens, shared by all requests (default 32768)",
    )
    group.add_argument(
        "--max-context",
        type=positive,
        metavar="N",
        help="max tokens of one request, prompt and output (default: what the model and --kv-cache-tokens allow)",
    )
    group.add_argument(
        "--max-queue",
        type=positive,
        default=256,
        metavar="N",
        help="max number of waiting requests; further ones get status 429 with Retry-After (default 256)",
    )
    flag(
        group,
        "--prefix-cache",
        default=True,
        help="reuse the KV cache of earlier requests with the same prompt prefix",
    )
    group.add_argument(
        "--prefix-cache-dir",
        metavar="DIR",
        help="store the prefix cache in DIR, so that the next start reuses it; conversations can be read from its files"
        " (default: memory only)",
    )
    group.add_argument(
        "--prefix-cache-gb",
        type=float,
        default=16.0,
        metavar="GB",
        help="max size of --prefix-cache-dir in GB; the oldest pages are evicted first (default 16)",
    )
    speculation_options(group)
    graphs_option(group)
    group.add_argument(
        "--backend-type",
        choices=("balance_serve", "ktransformers"),
        default="balance_serve",
        help=argparse.SUPPRESS,  # KTransformers' names of its engines, which have no effect here
    )


def run(args: argparse.Namespace, make: Callable[[argparse.Namespace, Any], Any] | None = None) -> int:
    """Serves until a signal arrives, then returns exit status 0.

    Args:
        make: creates the engine from the options and the state that receives its loading progress (default:
            `make_engine`).
    """
    make = make or make_engine
    missing = [name for name in REQUIRED_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"ktx serve needs {', '.join(missing)}: {install_command('serve')}")
    from ktx.server.auth import AccessPolicy
    from ktx.server.gc_tuning import freeze_gc
    from ktx.server.log import configure_logging

    keys = keys_of(args)
    check_exposure(args, keys)
    check_settings(args)
    serve_ray.check(args)
    configure_logging(args.log_level, args.log_format)
    from ktx.server.app import make_app
    from ktx.server.run import listen, serve
    from ktx.server.state import ServerState

    has_model = infer_model(args)
    names = tuple(args.model_name or [_model_name(args.model) if has_model else "ktx-demo"])
    if not has_model:
        use_demo_model(args)
    adapters = adapter_names(args, names)
    allowed_hosts = (*(args.allowed_hosts or ()), args.host)
    access = AccessPolicy(keys, tuple(allowed_hosts), tuple(origin.rstrip("/") for origin in args.cors_origins or ()))
    if args.ray:
        return serve_ray.serve_replicas(args, names, adapters, access, _server_settings(args), make)
    state = ServerState(names, _server_settings(args), adapters)
    listener = listen(args.host, args.port)
    app = make_app(state, access)
    load_errors: list[BaseException] = []

    def on_start(stop_server: Callable[[], None]) -> None:
        """Logs the address and starts loading, once the server listens; a failure to load stops the server.

        Clients can therefore poll /health while a large model loads.
        """

        def on_failure(error: BaseException) -> None:
            load_errors.append(error)
            stop_server()

        address = f"[{args.host}]" if ":" in args.host else args.host
        logging.getLogger("ktx.server").info(
            "listening on http://%s:%d, loading %s", address, listener.getsockname()[1], names[0]
        )
        state.load(load_engine, on_failure)

    def load_engine(state: ServerState) -> Any:
        engine = make(args, state)
        freeze_gc()
        return engine

    serve(app, state, listener, on_start)
    if load_errors:
        raise load_errors[0]
    return 0


def adapter_names(args: argparse.Namespace, names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the names of the LoRA adapters to serve, which requests give in place of the model's name.

    Raises:
        UsageError: an adapter has one of the model's `names`.
    """
    if not args.lora:
        return ()
    from ktx.model.lora import parse_adapters

    adapters = tuple(adapter.name for adapter in parse_adapters(args.lora))
    if duplicate := next((name for name in adapters if name in names), None):
        raise UsageError(f"--lora: {duplicate!r} is the model's name; give another one: NAME=DIR")
    return adapters


def _model_name(path: str) -> str:
    """Returns the name of a folder, or of a GGUF file without its suffix."""
    name = Path(path.rstrip("/")).name
    return name.removesuffix(".gguf") or path


def _server_settings(args: argparse.Namespace) -> Any:
    """Returns the server's settings (limits, sampling defaults, chat template, ...) from the command line.

    Raises UsageError for sampling defaults out of range, BadFile for a chat template that cannot be used.
    """
    from ktx.server.state import ServerSettings

    template = read_template(args.chat_template) if args.chat_template else None
    sampling = {name: getattr(args, name) for name in ("temperature", "top_p") if getattr(args, name) is not None}
    from ktx.engine.sampler import SamplingParams

    SamplingParams(**sampling)  # raises for values out of range
    max_stored = (  # 0 by default with --ray, because replicas share no stored responses
        (0 if args.ray else ServerSettings.max_stored_responses)
        if args.max_stored_responses is None
        else args.max_stored_responses
    )
    folder = Path(args.lora_dir).expanduser().resolve() if args.lora_dir else None
    return ServerSettings(
        max_new_tokens=args.max_new_tokens,
        force_think=args.force_think,
        chat_template=template,
        log_prompts=args.log_prompts,
        sampling=sampling,
        max_stored_responses=max_stored,
        lora_dir=folder,
    )


def read_template(file: str) -> str:
    """Reads a chat template.

    Raises:
        BadFile: the file cannot be read or is no valid template; the message has the line where one is known.
    """
    from ktx.engine.template import DEFAULT, check_templates

    location = f"--chat-template {file}"
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise BadFile(f"{location}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise BadFile(f"{location}, line {line}: is not valid UTF-8 (byte {error.start})") from error
    if not text.strip():
        raise BadFile(f"{location}: is empty")
    check_templates({DEFAULT: text}, location)
    return text


def make_engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of ktx.engine.engine.Options, by name, as the command line sets them."""
    return {
        "max_batch_size": args.max_batch_size,
        "chunk_size": args.chunk_size,
        "max_itl_ms": args.max_itl_ms,
        "kv_cache_tokens": args.kv_cache_tokens,
        "max_context": args.max_context,
        "max_queue": args.max_queue,
        "prefix_cache": args.prefix_cache,
        "prefix_cache_dir": args.prefix_cache_dir,
        "prefix_cache_gb": args.prefix_cache_gb,
        "speculative": args.speculative,
        "draft_tokens": args.draft_tokens,
        "cuda_graphs": args.cuda_graphs,
    }


def make_engine(args: argparse.Namespace, state: Any) -> Any:
    """Loads the model and returns its engine. The read bandwidth is measured first, while the memory is still free.

    Args:
        state: the server's state, which receives the loading progress and the measured read bandwidth.
    """
    import ktx
    from ktx.kernels.cpu import pool_size
    from ktx.kernels.microbench import free_read_bandwidth

    bandwidth = free_read_bandwidth(pool_size(args.threads))
    state.bandwidth = bandwidth and bandwidth.gb_s
    model, _ = ktx.load(
        args.model,
        args.weights,
        args.rules,
        threads=args.threads,
        progress=state.progress,
        mtp=args.speculative == "mtp",
        **load_arguments(args, engine=True),
    )
    logging.getLogger("ktx.server").info(
        "loaded in %.1f s, %s kernels, %d threads", model.ktx.seconds, model.ktx.isa, model.ktx.threads
    )
    model.ktx.use_lora()  # no adapter is active: each request names its own
    return model.ktx.engine(**make_engine_options(args))


def keys_of(args: argparse.Namespace) -> tuple[str, ...]:
    """Returns the API keys from the command line, --api-key-file and KTX_API_KEY, without duplicates.

    Raises:
        BadFile: the file cannot be read or has no key.
        UsageError: a key cannot be sent in an HTTP header.
    """
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
            raise BadFile(f"--api-key-file {args.api_key_file}: contains no key")
    keys += [key for key in os.environ.get("KTX_API_KEY", "").split() if key]
    if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise UsageError("an API key must consist of printable ASCII characters without spaces")
    return tuple(dict.fromkeys(keys))


def check_exposure(args: argparse.Namespace, keys: tuple[str, ...]) -> None:
    """Raises UsageError for a server without a key on an address that is not loopback, unless the user allows it.

    Anyone who reaches such an address could use the model.
    """
    try:
        is_loopback = ipaddress.ip_address(args.host).is_loopback
    except ValueError:
        is_loopback = args.host == "localhost"
    if not is_loopback and not keys and not args.allow_unauthenticated:
        raise UsageError(
            f"--host {args.host} without an API key would let anyone who reaches this machine use the server:"
            " give --api_key or --api_key_file, or --allow_unauthenticated"
        )


def check_settings(args: argparse.Namespace) -> None:
    """Raises UsageError or BadFile for values that are out of range or that contradict one another, before loading."""
    if not 0 <= args.port < 1 << 16:
        raise UsageError(f"--port {args.port}: must be from 0 to 65535")
    if args.max_stored_responses is not None and not 0 <= args.max_stored_responses <= MAX_STORED_RESPONSES:
        raise UsageError(
            f"--max-stored-responses {args.max_stored_responses}: must be from 0 to {MAX_STORED_RESPONSES}"
        )
    if args.max_stored_responses and args.ray:
        raise UsageError(
            f"--max-stored-responses {args.max_stored_responses}: replicas (--ray) share no stored responses;"
            " leave the option out, or give 0"
        )
    if args.lora_dir:
        if args.ray:
            raise UsageError(
                "--lora-dir: replicas (--ray) share no adapters that clients load; give --lora when starting instead"
            )
        if not Path(args.lora_dir).expanduser().is_dir():
            raise BadFile(f"--lora-dir {args.lora_dir}: no such folder")
    if args.kv_cache_tokens < MIN_KV_CACHE_TOKENS:
        raise UsageError(f"--kv-cache-tokens {args.kv_cache_tokens}: must be at least {MIN_KV_CACHE_TOKENS}")
