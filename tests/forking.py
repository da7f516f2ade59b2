"""One process of a test run that has imported what ranks of a cluster need, and from which they are forked.

Importing takes a process longer than what most tests ask of it. Not for tests of how a process starts.
"""

import multiprocessing
from multiprocessing.context import ForkServerContext


def forking() -> ForkServerContext:
    """Where processes are forked from; the first that asks in a test run says what it has imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["memserve.cluster.distributed"])
    return context
