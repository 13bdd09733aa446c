"""Ray Serve's `@serve.batch`, outside a cluster: a made-up replica context stands in for one."""

from __future__ import annotations

from ray import serve
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.config import DeploymentConfig
from ray.serve.context import _set_internal_replica_context
from ray.serve.schema import ReplicaRank

from bench.peers import BatchFunction, Collector

# The decorator reads `max_ongoing_requests` from the replica it believes it is in, to warn when batches cannot fill.
_set_internal_replica_context(
    replica_id=ReplicaID(unique_id="bench", deployment_id=DeploymentID(name="bench")),
    servable_object=None,
    _deployment_config=DeploymentConfig(max_ongoing_requests=1_000_000),
    rank=ReplicaRank(rank=0, node_rank=0, local_rank=0),
    world_size=1,
)


class Ray(Collector):
    name = "ray.serve.batch"
    distribution = "ray"

    def __init__(self, function: BatchFunction, size: int = 32, wait: float = 0.005) -> None:
        @serve.batch(max_batch_size=size, batch_wait_timeout_s=wait)
        async def batch(items):
            return await function(items)

        self.submit = batch


PEERS = (Ray,)
