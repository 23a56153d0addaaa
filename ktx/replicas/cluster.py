"""The server's Ray cluster: connects to it, places the replicas on its machines, starts and stops them."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import serve
from ray.serve.config import ProxyLocation, RequestRouterConfig
from ray.serve.exceptions import BackPressureError
from ray.serve.schema import ApplicationStatus
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ktx.errors import KtxError, UsageError
from ktx.hardware import format_bytes
from ktx.replicas.replica import Replica, ReplicaConfig
from ktx.replicas.spread import Node, ReplicaPlacement, place_replicas
from ktx.replicas.status import ReplicaStatus, StatusActor

BUSY_ERRORS = (BackPressureError,)
DEAD_REPLICA_ERRORS = (
    ray.exceptions.RayActorError,
    ray.exceptions.ActorUnavailableError,
    ray.exceptions.WorkerCrashedError,
)
OBJECT_STORE_BYTES = 256 << 20  # shared memory for Ray's objects: responses are small, and the models need the rest
STATUS_TIMEOUT_S, STATUS_MAX_AGE_S = 2.0, 0.5  # to read the statuses, and until they are read again
MAX_SHORT_REQUESTS = 64  # requests that a replica accepts in addition to its engine's batch and queue
log = logging.getLogger("ktx.server")


@dataclass(frozen=True)
class ClusterConfig:
    """Options of the replicas and of the cluster that they run in."""

    app: str  # name of the Ray Serve application
    address: str | None  # of a running cluster; None: start a cluster on this machine
    replicas: int | None  # None: one per machine
    threads: int | None  # per replica; None: a machine's cores divided among its replicas
    replica_bytes: int  # memory that one replica takes
    replica: ReplicaConfig
    max_batch_size: int
    max_queue: int  # waiting requests of a replica
    prefix_cache_pages: int


class Cluster:
    """The replicas of one server. `handle` is None until a replica is ready; `load_error` is why none ever will be."""

    def __init__(self, config: ClusterConfig):
        self.config, self.num_replicas = config, config.replicas or 0
        self.handle: Any = None
        self.status_actor: Any = None
        self.load_error = ""
        self.stopping = self.closed = self.serve_was_running = False
        self.last_statuses: list[ReplicaStatus] = []
        self.read_at = 0.0  # when `last_statuses` were read, time.monotonic()
        self.last_message = ""  # the latest message of Ray Serve in the log, so that each is logged once

    def connect(self) -> None:
        """Connects to the running cluster, or starts one whose processes end with the calling thread.

        Ray Serve's own HTTP proxy stays off, because it reads whole bodies before an API key is checked.

        Raises:
            UsageError: there is no cluster at the address, or none could be started.
        """
        address, quiet = self.config.address, {"configure_logging": False, "log_to_driver": True}
        try:
            if address is None:
                ray.init(  # type: ignore[arg-type]
                    "local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet
                )
            else:
                ray.init(address, **quiet)  # type: ignore[arg-type]
        except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            first_line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            source = f"--ray-address {address}" if address else "a Ray cluster on this machine"
            raise UsageError(f"{source}: {first_line[:300]}") from error
        status = serve.status()
        self.serve_was_running = bool(status.applications or status.proxies)
        if not self.serve_was_running:
            serve.start(proxy_location=ProxyLocation.Disabled, logging_config={"log_level": "WARNING"})
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        if os.environ.get("RAY_AUTH_MODE") != "token":
            log.warning(
                "this Ray cluster requires no token: anyone who can reach its ports can run code on its machines"
            )

    def load(self, failed: Callable[[BaseException], None]) -> None:
        """Starts the replicas in a new thread, so that /health is available while they load.

        Args:
            failed: called with the error when the replicas could not be started.
        """

        def run() -> None:
            """Starts the replicas; an error sets `load_error` unless the server is stopping anyway."""
            try:
                self._start()
            # Every error must reach /health and the caller of the server.
            except BaseException as error:
                if not self.stopping:
                    reported = (
                        error if isinstance(error, KtxError) else KtxError(f"Ray: {type(error).__name__}: {error}")
                    )
                    self.load_error = str(reported)
                    failed(reported)

        threading.Thread(target=run, name="ktx-cluster", daemon=True).start()

    def _start(self) -> None:
        """Places the replicas, starts the status actor and the deployment, and waits until a replica is ready."""
        config = self.config
        placement = place_replicas(list_nodes(), config.replicas, config.threads, config.replica_bytes)
        self.num_replicas = placement.replicas
        log.info(
            "starting %d replicas, %d per machine, with %d threads and %s of weights each",
            placement.replicas,
            placement.per_node,
            placement.threads,
            format_bytes(config.replica_bytes),
        )
        this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.status_actor = StatusActor.options(scheduling_strategy=this_node).remote()  # type: ignore[attr-defined]
        replica = replace(config.replica, threads=placement.threads, per_node=placement.per_node)
        app = make_deployment(config, placement).bind(replica, self.status_actor)
        target = serve.RunTarget(app, config.app, None, {"log_level": "WARNING", "enable_access_log": False})
        handle = serve.run_many([target], wait_for_applications_running=False)[0]
        self._wait_for_replica()
        self.handle = handle.options(stream=True, method_name="answer")

    def _wait_for_replica(self) -> None:
        """Returns when a replica is ready. Raises KtxError when a replica or Ray Serve reports a failure."""
        while not self.stopping:
            self.last_statuses = ray.get(self.status_actor.read.remote())
            if any(status.ready for status in self.last_statuses):
                return
            if load_error := next((status.error for status in self.last_statuses if status.error), ""):
                raise KtxError(load_error)
            self._check_serve()
            time.sleep(0.2)

    def _check_serve(self) -> None:
        """Logs what Ray Serve reports about replicas that cannot report themselves.

        Such replicas fit on no machine or died at their start.

        Raises:
            KtxError: the deployment failed.
        """
        app = serve.status().applications.get(self.config.app)
        if app is None:
            return
        message = last_line("\n".join([app.message, *(part.message for part in app.deployments.values())]))
        if app.status == ApplicationStatus.DEPLOY_FAILED:
            raise KtxError(f"Ray Serve: {message}")
        if message and message != self.last_message:
            self.last_message = message
            log.warning("Ray Serve: %s", message)

    async def statuses(self) -> list[ReplicaStatus]:
        """Returns the replicas' statuses, at most `STATUS_MAX_AGE_S` old, or the last ones if reading is too slow."""
        if self.status_actor is not None and not self.closed and time.monotonic() - self.read_at > STATUS_MAX_AGE_S:
            with suppress(TimeoutError, ray.exceptions.RayError):
                self.last_statuses = await asyncio.wait_for(
                    asyncio.wrap_future(self.status_actor.read.remote().future()), STATUS_TIMEOUT_S
                )
                self.read_at = time.monotonic()
        return self.last_statuses

    async def ready(self) -> bool:
        """Returns whether a replica can answer requests."""
        return self.handle is not None and not self.stopping and any(status.ready for status in await self.statuses())

    def unavailable_reason(self) -> str:
        """Returns why no replica can answer requests, for the user: shutdown, a load error, or the loading progress."""
        if self.stopping:
            return "the server is shutting down"
        if self.load_error:
            return f"the model could not be loaded: {self.load_error}"
        total, done = (
            sum(status.total_bytes for status in self.last_statuses),
            sum(status.loaded_bytes for status in self.last_statuses),
        )
        return f"Loading model: {100 * done / total if total else 0:.0f} %"

    def stop(self) -> None:
        """Stops the engines of all replicas; each stream gets its final event."""
        self.stopping = True
        if self.status_actor is not None:
            with suppress(ray.exceptions.RayError):  # a cluster that is already down has no streams either
                ray.get(self.status_actor.end.remote(), timeout=5)

    def close(self) -> None:
        """Deletes the application and disconnects. A cluster that the server started shuts down."""
        self.stopping = self.closed = True
        try:
            if self.config.address is not None and self.config.app in serve.status().applications:
                serve.delete(self.config.app)
            # Ray Serve ends if this server started it, unless other applications now run on that cluster
            if not self.serve_was_running and not (self.config.address and serve.status().applications):
                serve.shutdown()
        # Whatever state the cluster is in, this process disconnects.
        except Exception as error:
            log.warning("Ray: %s: %s", type(error).__name__, last_line(str(error)))
        ray.shutdown()


def last_line(text: str) -> str:
    """Returns the last line of a text that is not blank, such as the error of a traceback."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")[:300]


def list_nodes() -> list[Node]:
    """Returns the machines that have CPUs in Ray, each with the cores and free memory that a task on it reports.

    Raises:
        UsageError: there is none.
        KtxError: ktx does not run on one of them.
    """
    found = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    if not found:
        raise UsageError("the Ray cluster has no machine with CPUs")
    probes = [
        probe_node.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
        for node in found
    ]
    nodes = []
    for node, ref in zip(found, probes, strict=True):
        try:
            cores, free = ray.get(ref, timeout=120)
        except ray.exceptions.RayTaskError as error:
            raise KtxError(
                f"{node['NodeManagerAddress']}: ktx does not run on this machine: {error.cause}; install ktx there"
            ) from error
        nodes.append(Node(node["NodeID"], node["NodeManagerAddress"], node["Resources"]["CPU"], cores, free))
    return nodes


@ray.remote(num_cpus=0)
def probe_node() -> tuple[int, int]:
    """Returns the number of cores and the bytes of free memory of the machine that it runs on."""
    from ktx.hardware import default_threads, memory

    return default_threads(), memory()[1]


def make_deployment(config: ClusterConfig, placement: ReplicaPlacement) -> Any:
    """Returns the Ray Serve deployment of the replicas.

    The replicas of a remote cluster get this process's KTX_* variables, except the API key.
    """
    env_vars = {name: value for name, value in os.environ.items() if name.startswith("KTX_") and name != "KTX_API_KEY"}
    options: dict[str, Any] = {"num_cpus": placement.cpus}
    if config.address is not None and env_vars:
        options["runtime_env"] = {"env_vars": env_vars}
    router: Any = {
        "request_router_class": "ktx.replicas.router:PrefixRouter",
        "request_router_kwargs": {"pages": config.prefix_cache_pages, "max_imbalance": config.max_batch_size},
    }
    return serve.deployment(
        Replica,
        name="replica",
        num_replicas=placement.replicas,
        max_replicas_per_node=placement.per_node,
        max_ongoing_requests=config.max_batch_size + config.max_queue + MAX_SHORT_REQUESTS,
        max_queued_requests=config.max_queue,
        max_constructor_retry_count=1,
        ray_actor_options=options,
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=5,
        request_router_config=RequestRouterConfig(**router),
    )
