"""ktx serve --ray: several replicas behind one address."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import socket
from collections.abc import Callable
from typing import Any

from ktx.cli.arguments import flag, placed, positive
from ktx.errors import UsageError
from ktx.utils.versions import install


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several replicas (Ray Serve)")
    flag(group, "--ray", help="run replicas of the model on Ray Serve, each with its own copy, behind this one address")
    group.add_argument(
        "--replicas", type=positive, metavar="N", help="how many, shared evenly among machines (default: one a machine)"
    )
    group.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="the Ray cluster to use, HOST:PORT or auto (default: a new one on this machine alone)",
    )


def _missing() -> str:
    return f"ktx serve --ray needs Ray Serve: {install('ray')}"


def check(args: argparse.Namespace) -> None:
    """UsageError for options that need others, and for a Ray that is missing."""
    if not args.ray:
        if args.replicas or args.ray_address:
            raise UsageError(f"{'--replicas' if args.replicas else '--ray-address'} needs --ray")
        return
    if importlib.util.find_spec("ray") is None:
        raise UsageError(_missing())
    if args.ray_address not in (None, "auto"):
        check_address(args.ray_address)


def check_address(address: str) -> None:
    """UsageError when nobody listens there: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdigit():
        raise UsageError(f"--ray-address {address}: must be HOST:PORT of the cluster's first machine, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise UsageError(f"--ray-address {address}: nobody answers there: {error}") from error


def serve_replicas(
    args: argparse.Namespace,
    names: tuple[str, ...],
    adapters: tuple[str, ...],
    access: Any,
    settings: Any,
    make: Callable[[argparse.Namespace, Any], Any],
) -> int:
    """Serves until a signal; exit status 0 then. `make` makes an engine of the options and a tally of bytes."""
    from ktx.replicas import prepare

    prepare(own=args.ray_address is None)
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from ktx.cache.page_pool import PAGE_TOKENS

    try:
        from ktx.replicas.cluster import Cluster, ClusterConfig
        from ktx.replicas.proxy import ReplicaProxy
    except ImportError as error:
        raise UsageError(f"{_missing()} ({error})") from error
    from ktx.replicas.replica import ReplicaConfig
    from ktx.server.auth import AuthMiddleware
    from ktx.server.run import listen, serve

    where = listen(args.host, args.port)
    kept = {name: value for name, value in vars(args).items() if not name.startswith("api_key")}
    making = ReplicaConfig(Engines(make, kept), names, adapters, settings, (args.log_level, args.log_format), 1, 1)
    cluster = Cluster(
        ClusterConfig(
            f"ktx-{names[0].replace('/', '-')}",
            args.ray_address,
            args.replicas,
            args.threads,
            need_of(args),
            making,
            args.max_batch_size,
            args.max_queue,
            0 if args.no_prefix_cache else args.cache_lens // PAGE_TOKENS,
        )
    )
    trouble: list[BaseException] = []

    def started(end: Callable[[], None]) -> None:
        def failed(error: BaseException) -> None:
            trouble.append(error)
            end()

        address = f"[{args.host}]" if ":" in args.host else args.host
        logging.getLogger("ktx.server").info(
            "listening on http://%s:%d, loading %s on Ray", address, where.getsockname()[1], names[0]
        )
        cluster.load(failed)

    cluster.connect()
    try:
        serve(AuthMiddleware(ReplicaProxy(cluster), access), cluster, where, started)
    finally:
        cluster.close()
    if trouble:
        raise trouble[0]
    return 0


class Engines:
    """Makes a replica's engine, in its process: a class by its name, because it travels there."""

    def __init__(self, make: Callable[[argparse.Namespace, Any], Any], words: dict[str, Any]):
        self.make, self.words = make, words

    def __call__(self, threads: int, served: Any) -> Any:
        return self.make(argparse.Namespace(**{**self.words, "threads": threads}), served)


def need_of(args: argparse.Namespace) -> int:
    """Bytes of memory that one copy of the model takes, from headers alone."""
    if args.backend_type == "scripted":
        return 0
    import ktx
    from ktx.loader.load import memory_needed

    plan = ktx.plan(
        args.model,
        args.weights,
        args.rules,
        args.trust_remote_code,
        args.dtype,
        args.moe_dtype,
        lora=args.lora,
        **placed(args),
    )
    plan.check()
    return memory_needed(plan)
