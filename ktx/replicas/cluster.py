"""A server's part of a Ray cluster: where its replicas go, their start and their end."""

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
from ktx.replicas.spread import Layout, Node, lay_out
from ktx.replicas.status import ReplicaStatus, StatusActor

BUSY = (BackPressureError,)
GONE = (ray.exceptions.RayActorError, ray.exceptions.ActorUnavailableError, ray.exceptions.WorkerCrashedError)
OBJECTS = 256 << 20  # bytes of shared memory for Ray's objects: answers are small, and models want the rest
PROMPT, FRESH = 2.0, 0.5  # seconds that the board may take, and for which its answer serves
BESIDE = 64  # short requests that a replica takes beside those that wait for its engine
log = logging.getLogger("ktx.server")


@dataclass(frozen=True)
class ClusterConfig:
    """What is to run. `need`: bytes of memory that a copy of the model takes; `threads` None: a machine's cores divided among its replicas."""

    app: str
    address: str | None  # of a cluster that is there; None: one of our own, on this machine
    replicas: int | None  # None: one a machine
    threads: int | None
    need: int
    making: ReplicaConfig
    batch: int
    queue: int
    pages: int


class Cluster:
    """`handle` is None until a replica can answer, `trouble` says why none ever will."""

    def __init__(self, wanted: ClusterConfig):
        self.asked, self.wanted = wanted, wanted.replicas or 0
        self.handle: Any = None
        self.board: Any = None
        self.trouble = ""
        self.stopping = self.closed = self.serve_was_there = False
        self.seen: list[ReplicaStatus] = []
        self.seen_at = 0.0
        self.told = ""

    def connect(self) -> None:
        """To the cluster that is there, or to a new one, whose processes end with the thread that calls this. UsageError when there is none.

        Serve's own proxy stays off: it reads whole bodies before anybody has seen a key.
        """
        address, quiet = self.asked.address, {"configure_logging": False, "log_to_driver": True}
        try:
            if address is None:
                ray.init("local", include_dashboard=False, object_store_memory=OBJECTS, **quiet)  # type: ignore[arg-type]
            else:
                ray.init(address, **quiet)  # type: ignore[arg-type]
        except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            where = f"--ray-address {address}" if address else "a Ray cluster on this machine"
            raise UsageError(f"{where}: {first[:300]}") from error
        status = serve.status()
        self.serve_was_there = bool(status.applications or status.proxies)
        if not self.serve_was_there:
            serve.start(proxy_location=ProxyLocation.Disabled, logging_config={"log_level": "WARNING"})
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        if os.environ.get("RAY_AUTH_MODE") != "token":
            log.warning("this Ray cluster asks for no token: whoever reaches its ports can run code on its machines")

    def load(self, failed: Callable[[BaseException], None]) -> None:
        """Starts the replicas in a thread of its own, so that /health answers meanwhile."""

        def run() -> None:
            try:
                self._start()
            except BaseException as error:  # whoever asks for /health, and whoever started the server, must hear of it
                if not self.stopping:
                    told = error if isinstance(error, KtxError) else KtxError(f"Ray: {type(error).__name__}: {error}")
                    self.trouble = str(told)
                    failed(told)

        threading.Thread(target=run, name="ktx-cluster", daemon=True).start()

    def _start(self) -> None:
        asked = self.asked
        layout = lay_out(list_nodes(), asked.replicas, asked.threads, asked.need)
        self.wanted = layout.replicas
        log.info(
            "%d replicas, %d on a machine, %d threads each, %s of weights each",
            layout.replicas,
            layout.beside,
            layout.threads,
            format_bytes(asked.need),
        )
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.board = StatusActor.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        making = replace(asked.making, threads=layout.threads, beside=layout.beside)
        app = deployment(asked, layout).bind(making, self.board)
        target = serve.RunTarget(app, asked.app, None, {"log_level": "WARNING", "enable_access_log": False})
        handle = serve.run_many([target], wait_for_applications_running=False)[0]
        self._await_one()
        self.handle = handle.options(stream=True, method_name="answer")

    def _await_one(self) -> None:
        """Until a replica is ready. KtxError when one says that it never will be, or Serve does."""
        while not self.stopping:
            self.seen = ray.get(self.board.read.remote())
            if any(word.ready for word in self.seen):
                return
            if trouble := next((word.error for word in self.seen if word.error), ""):
                raise KtxError(trouble)
            self._hear_serve()
            time.sleep(0.2)

    def _hear_serve(self) -> None:
        """What Serve says of replicas that cannot speak for themselves: no machine has room for them, or they died at once."""
        app = serve.status().applications.get(self.asked.app)
        if app is None:
            return
        told = last_line("\n".join([app.message, *(one.message for one in app.deployments.values())]))
        if app.status == ApplicationStatus.DEPLOY_FAILED:
            raise KtxError(f"Ray Serve: {told}")
        if told and told != self.told:
            self.told = told
            log.warning("Ray Serve: %s", told)

    async def words(self) -> list[ReplicaStatus]:
        """What the replicas say now; while the board is slow to answer, what they said last."""
        if self.board is not None and not self.closed and time.monotonic() - self.seen_at > FRESH:
            with suppress(TimeoutError, ray.exceptions.RayError):
                self.seen = await asyncio.wait_for(asyncio.wrap_future(self.board.read.remote().future()), PROMPT)
                self.seen_at = time.monotonic()
        return self.seen

    async def ready(self) -> bool:
        """Whether a replica can answer."""
        return self.handle is not None and not self.stopping and any(word.ready for word in await self.words())

    def why(self) -> str:
        """Why no replica answers."""
        if self.stopping:
            return "the server is shutting down"
        if self.trouble:
            return f"the model could not be loaded: {self.trouble}"
        total, done = sum(word.total for word in self.seen), sum(word.done for word in self.seen)
        return f"Loading model: {100 * done / total if total else 0:.0f} %"

    def stop(self) -> None:
        """Every replica ends what it runs, each stream with its last words."""
        self.stopping = True
        if self.board is not None:
            with suppress(ray.exceptions.RayError):  # a cluster that has gone has no streams either
                ray.get(self.board.end.remote(), timeout=5)

    def close(self) -> None:
        """Leaves the cluster as it was found; one of our own ends."""
        self.stopping = self.closed = True
        try:
            if self.asked.address is not None and self.asked.app in serve.status().applications:
                serve.delete(self.asked.app)
            if not self.serve_was_there and not (self.asked.address and serve.status().applications):
                serve.shutdown()
        except Exception as error:  # whatever became of the cluster, this process leaves it
            log.warning("Ray: %s: %s", type(error).__name__, last_line(str(error)))
        ray.shutdown()


def last_line(text: str) -> str:
    """What a traceback ends with."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")[:300]


def list_nodes() -> list[Node]:
    """The machines that Ray counts CPUs of, asked for what they have."""
    found = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    if not found:
        raise UsageError("the Ray cluster has no machine with CPUs")
    asked = [
        probe_node.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
        for node in found
    ]
    nodes = []
    for node, ref in zip(found, asked, strict=True):
        try:
            cores, free = ray.get(ref, timeout=120)
        except ray.exceptions.RayTaskError as error:
            raise KtxError(
                f"{node['NodeManagerAddress']}: ktx does not run there: {error.cause}; install it"
            ) from error
        nodes.append(Node(node["NodeID"], node["NodeManagerAddress"], node["Resources"]["CPU"], cores, free))
    return nodes


@ray.remote(num_cpus=0)
def probe_node() -> tuple[int, int]:
    """Cores and bytes of free memory of the machine that this runs on."""
    from ktx.hardware import default_threads, memory

    return default_threads(), memory()[1]


def deployment(asked: ClusterConfig, layout: Layout) -> Any:
    """The replicas as Serve is told of them."""
    words = {name: value for name, value in os.environ.items() if name.startswith("KTX_") and name != "KTX_API_KEY"}
    options: dict[str, Any] = {"num_cpus": layout.cpus}
    if asked.address is not None and words:
        options["runtime_env"] = {"env_vars": words}
    router: Any = {
        "request_router_class": "ktx.replicas.router:PrefixRouter",
        "request_router_kwargs": {"pages": asked.pages, "crowd": asked.batch},
    }
    return serve.deployment(
        Replica,
        name="replica",
        num_replicas=layout.replicas,
        max_replicas_per_node=layout.beside,
        max_ongoing_requests=asked.batch + asked.queue + BESIDE,
        max_queued_requests=asked.queue,
        max_constructor_retry_count=1,
        ray_actor_options=options,
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=5,
        request_router_config=RequestRouterConfig(**router),
    )
