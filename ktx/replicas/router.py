"""Our choice of a replica inside Ray Serve's router (its public API for request routers)."""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from ktx.replicas.affinity import Affinity


class PrefixRouter(RequestRouter):
    """The first argument of a call are the keys of its prompt. Which replicas have room is the base class's affair."""

    def initialize_state(self, pages: int, crowd: int) -> None:  # type: ignore[override]
        self.affinity = Affinity(pages, crowd)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        keys, request = [], ""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # else a full house is asked again without a pause
            keys, request = pending_request.args[0], pending_request.metadata.internal_request_id
        by_id = {replica.replica_id: replica for replica in candidate_replicas}
        order = self.affinity.order(keys, list(by_id))
        if request and order:  # at once: others are routed before a replica has said that it takes this one
            self.affinity.on_start(request, order[0], keys, sent=False)
        return [[by_id[one]] for one in order]  # type: ignore[index]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        self.affinity.on_start(pending_request.metadata.internal_request_id, replica_id, pending_request.args[0])

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self.affinity.on_finish(internal_request_id)
