"""ktx serve --ray: several replicas of the model behind one address, on Ray Serve."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import socket
from collections.abc import Callable
from typing import Any

from ktx.cli.arguments import flag, placement_kwargs, positive
from ktx.errors import UsageError
from ktx.utils.versions import install_command


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of replicas, several copies of the model behind one address, to the parser of `ktx serve`."""
    group = parser.add_argument_group("several replicas (Ray Serve)")
    flag(
        group,
        "--ray",
        help="run replicas of the model on Ray Serve, each with its own copy, behind this server's address",
    )
    group.add_argument(
        "--replicas",
        type=positive,
        metavar="N",
        help="number of replicas, spread evenly over the machines of the cluster (default: one per machine)",
    )
    group.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="Ray cluster to use: HOST:PORT of its head node, or auto to find it (default: start one on this machine)",
    )


def _missing() -> str:
    return f"ktx serve --ray needs Ray Serve: {install_command('ray')}"


def check(args: argparse.Namespace) -> None:
    """Raises UsageError for replica options without --ray, for a missing Ray package and an unreachable cluster."""
    if not args.ray:
        if args.replicas or args.ray_address:
            raise UsageError(f"{'--replicas' if args.replicas else '--ray-address'} needs --ray")
        return
    if importlib.util.find_spec("ray") is None:
        raise UsageError(_missing())
    if args.ray_address not in (None, "auto"):
        check_address(args.ray_address)


def check_address(address: str) -> None:
    """Raises UsageError when nothing listens at `address`, because Ray itself would retry for minutes."""
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdigit():
        raise UsageError(f"--ray-address {address}: must be HOST:PORT of the cluster's head node, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise UsageError(f"--ray-address {address}: no cluster is reachable there: {error}") from error


def serve_replicas(
    args: argparse.Namespace,
    names: tuple[str, ...],
    adapters: tuple[str, ...],
    access: Any,
    settings: Any,
    make: Callable[[argparse.Namespace, Any], Any],
) -> int:
    """Serves until a signal arrives, then returns exit status 0.

    Args:
        names: names of the model in the API.
        adapters: names of the LoRA adapters.
        access: the `AccessPolicy` of the server.
        settings: the `ServerSettings` of each replica.
        make: creates an engine from the options and the state that receives its loading progress.
    """
    from ktx.replicas import configure_ray_env

    configure_ray_env(own_cluster=args.ray_address is None)
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

    listener = listen(args.host, args.port)
    options = {name: value for name, value in vars(args).items() if not name.startswith("api_key")}
    replica_config = ReplicaConfig(
        make=EngineFactory(make, options),
        names=names,
        adapters=adapters,
        settings=settings,
        log=(args.log_level, args.log_format),
        threads=1,
        per_node=1,
    )
    cluster = Cluster(
        ClusterConfig(
            app=f"ktx-{names[0].replace('/', '-')}",
            address=args.ray_address,
            replicas=args.replicas,
            threads=args.threads,
            replica_bytes=memory_bytes(args),
            replica=replica_config,
            max_batch_size=args.max_batch_size,
            max_queue=args.max_queue,
            prefix_cache_pages=args.kv_cache_tokens // PAGE_TOKENS if args.prefix_cache else 0,
        )
    )
    load_errors: list[BaseException] = []

    def on_start(stop_server: Callable[[], None]) -> None:
        """Logs the address and starts the replicas, once the server listens; a failure stops the server.

        Clients can therefore poll /health while the replicas load.
        """

        def on_failure(error: BaseException) -> None:
            load_errors.append(error)
            stop_server()

        address = f"[{args.host}]" if ":" in args.host else args.host
        logging.getLogger("ktx.server").info(
            "listening on http://%s:%d, loading %s on Ray", address, listener.getsockname()[1], names[0]
        )
        cluster.load(on_failure)

    cluster.connect()
    try:
        serve(AuthMiddleware(ReplicaProxy(cluster), access), cluster, listener, on_start)
    finally:
        cluster.close()
    if load_errors:
        raise load_errors[0]
    return 0


class EngineFactory:
    """Creates a replica's engine in the replica's process; it is pickled by its name to get there."""

    def __init__(self, make: Callable[[argparse.Namespace, Any], Any], options: dict[str, Any]):
        self.make, self.options = make, options

    def __call__(self, threads: int, state: Any) -> Any:
        """Returns the engine of a replica with so many threads."""
        return self.make(argparse.Namespace(**{**self.options, "threads": threads}), state)


def memory_bytes(args: argparse.Namespace) -> int:
    """Returns the bytes of memory that one copy of the model takes, from the checkpoint's headers.

    Replicas are placed by this number, so that the copies on a machine fit its memory.
    """
    import ktx
    from ktx.loader.resources import memory_needed

    plan = ktx.plan(
        args.model,
        args.weights,
        args.rules,
        args.trust_remote_code,
        args.quantize,
        args.quantize_experts,
        lora=args.lora,
        **placement_kwargs(args),
    )
    plan.check()
    return memory_needed(plan)
