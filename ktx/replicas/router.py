"""The request router that Ray Serve uses to choose a replica (Serve's public API for request routers)."""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from ktx.replicas.affinity import Affinity


class PrefixRouter(RequestRouter):
    """Ranks replicas by cached prefix. The first argument of each call is the list of its prompt's prefix keys.

    The base class checks which replicas have capacity.
    """

    def initialize_state(self, pages: int, max_imbalance: int) -> None:  # type: ignore[override]
        """Called by Ray Serve with `request_router_kwargs`; see `Affinity` for the two arguments."""
        self.affinity = Affinity(pages, max_imbalance)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Returns the candidates in order of preference, one per rank; Ray Serve tries them in this order."""
        keys, request = [], ""
        if pending_request is not None:
            # Without backoff the router polls replicas that are at capacity in a busy loop.
            pending_request.routing_context.should_backoff = True
            # Replica.answer's first argument
            keys, request = pending_request.args[0], pending_request.metadata.internal_request_id
        by_id = {replica.replica_id: replica for replica in candidate_replicas}
        order = self.affinity.rank(keys, list(by_id))
        # Recorded now, because other requests are routed before the replica accepts this one.
        if request and order:
            self.affinity.on_routed(request, order[0], keys, sent=False)
        return [[by_id[replica]] for replica in order]  # type: ignore[index]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        """Called by Ray Serve when a replica accepts a request."""
        self.affinity.on_routed(pending_request.metadata.internal_request_id, replica_id, pending_request.args[0])

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Ray Serve when a request ends."""
        self.affinity.on_finish(internal_request_id)
