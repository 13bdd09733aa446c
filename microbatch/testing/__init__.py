"""Doubles for tests, users' included: a scripted transport, a virtual clock, a simulated endpoint with faults and a quota."""

from microbatch.testing.answers import simulated_answer
from microbatch.testing.clock import DeadlockError, VirtualClockLoop, loop_factories
from microbatch.testing.embedding_faults import EmbeddingFaults
from microbatch.testing.embeddings import SimulatedEmbeddings, embedded
from microbatch.testing.endpoint import SimulatedEndpoint
from microbatch.testing.faults import Faults
from microbatch.testing.mistakes import Mistakes
from microbatch.testing.model import SimulatedModel
from microbatch.testing.pace import Latency
from microbatch.testing.quota import Quota
from microbatch.testing.scripted import ScriptedCall, ScriptedTransport
from microbatch.testing.transport import SimulatedTransport

__all__ = [
    "DeadlockError",
    "EmbeddingFaults",
    "Faults",
    "Latency",
    "Mistakes",
    "Quota",
    "ScriptedCall",
    "ScriptedTransport",
    "SimulatedEmbeddings",
    "SimulatedEndpoint",
    "SimulatedModel",
    "SimulatedTransport",
    "VirtualClockLoop",
    "embedded",
    "loop_factories",
    "simulated_answer",
]
