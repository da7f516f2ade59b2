"""Moving bytes between the memories of instances: links, transports, copies and faults. Knows no KV and no block."""

from memserve.transfer.faults import MessageFaults, StallingTransport
from memserve.transfer.gloo import Gloo
from memserve.transfer.in_process import InProcess
from memserve.transfer.link import LinkModel
from memserve.transfer.mapped import Mapped
from memserve.transfer.nccl import Nccl
from memserve.transfer.transport import Arrived, Move, MoveId, Transport

__all__ = [
    "Arrived",
    "Gloo",
    "InProcess",
    "LinkModel",
    "Mapped",
    "MessageFaults",
    "Move",
    "MoveId",
    "Nccl",
    "StallingTransport",
    "Transport",
]
