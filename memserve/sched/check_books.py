"""Check of a local scheduler's books against its pool's, for tests and fuzzing."""

from collections.abc import Iterable

import numpy as np

from memserve.kvcache.block_pool import BlockPool
from memserve.request import Request


def check_books(pool: BlockPool, running: Iterable[Request], others: Iterable[Request]) -> None:
    """Raises unless tables, holders and borders agree. others: requests that may hold blocks and do not run."""
    pool.check()
    running = list(running)
    for request in running:
        assert request.num_computed <= request.num_tokens
        assert len(request.block_table) >= pool.blocks_for(request.num_computed)
        held = pool.allocator.held_by(request.holder)
        assert np.isin(request.block_table.view, held).all(), f"{request.request_id} uses a block it does not hold"
    counts = pool.allocator.refcounts
    in_use = counts - 2 * pool.are_swapping(np.arange(len(counts))) > 1  # a swap lets go by itself
    for _, blocks in pool.index.iter_prefixes():
        of_path = in_use[blocks]
        assert not (of_path[1:] & ~of_path[:-1]).any(), "a cached block in use hangs below one that may be evicted"
    names = {request.holder for request in (*running, *others)}
    strangers = [h for h in pool.allocator.holders() if h[0] == "request" and h not in names]
    assert not strangers, f"blocks held by requests that do not run: {strangers}"
