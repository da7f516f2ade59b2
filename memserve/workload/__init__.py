"""Workloads: which requests a run submits, and when. Sessions, the client that plays them, and where they come from."""

from memserve.workload.agent import AgentWorkload
from memserve.workload.arrivals import Arrivals, ClosedLoop, Gamma, Poisson
from memserve.workload.chat import ChatWorkload
from memserve.workload.conversations import BadConversation
from memserve.workload.docqa import DocumentQA
from memserve.workload.player import PlayerCounts, SessionPlayer
from memserve.workload.session import ChatTokenizer, Session, Turn, Workload
from memserve.workload.synthetic import SyntheticWorkload
from memserve.workload.trace import TraceWorkload

__all__ = [
    "AgentWorkload",
    "Arrivals",
    "BadConversation",
    "ChatTokenizer",
    "ChatWorkload",
    "ClosedLoop",
    "DocumentQA",
    "Gamma",
    "PlayerCounts",
    "Poisson",
    "Session",
    "SessionPlayer",
    "SyntheticWorkload",
    "TraceWorkload",
    "Turn",
    "Workload",
]
