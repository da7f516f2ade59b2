"""TransferCost: what fetching KV from an instance costs, with a latency per call (section 5.3). Knows no transport.

The paper's Eq. 2 divides bytes by the bandwidth alone; then 10,000 calls of 32 KiB cost what one of 320 MiB does, and
its own Fig. 11 shows a factor of five between the two.
"""

from dataclasses import dataclass

import numpy as np

from memserve.clock import to_s
from memserve.kvcache.granularity import End, Granularity
from memserve.transfer.link import LinkModel, duration_ns

NUM_MESSAGES = 4  # one after the other: Fetch, Ask and Grant before the first byte leaves, Done after the last


@dataclass(frozen=True)
class TransferCost:
    """seconds = 4 messages + latency * calls + bytes / bandwidth.

    block_bytes, block_calls: of a block of KV, all layers, by the granularity in use; where instances have several
    ranks, of one pair of them, since all move their heads at the same time.  other_calls: however many blocks.
    """

    link: LinkModel
    block_bytes: int
    block_calls: int
    other_calls: int

    @classmethod
    def of(cls, link: LinkModel, granularity: Granularity, num_layers: int) -> "TransferCost":
        """Of what a granularity makes of one block and of two that are not adjacent."""
        one, two = (_calls_and_bytes(granularity, num_blocks, num_layers) for num_blocks in (1, 2))
        calls = two[0] - one[0]
        return cls(link, one[1], calls, one[0] - calls)

    def fetch_time_s(self, num_blocks: int) -> float:
        """Seconds from asking until the KV of num_blocks blocks is usable here; 0 for none."""
        if num_blocks <= 0:
            return 0.0
        num_calls = self.other_calls + self.block_calls * num_blocks
        bytes_ns = duration_ns(self.link, num_calls, self.block_bytes * num_blocks)
        return to_s(bytes_ns + NUM_MESSAGES * self.link.message_ns)


def _calls_and_bytes(granularity: Granularity, num_blocks: int, num_layers: int) -> tuple[int, int]:
    blocks = 2 * np.arange(num_blocks, dtype=np.int32)
    here, there = (End((end, 0), 2 * num_blocks, blocks, granularity.num_ranks) for end in (0, 1))
    nothing, everything = np.zeros(num_layers, dtype=np.int64), np.full(num_layers, num_blocks)
    stretches = granularity.stretches(nothing, everything, num_blocks)
    moves = [granularity.moves(here, there, stretch.layer)[0] for stretch in stretches]  # of the first pair
    return sum(move.num_calls for move in moves), sum(move.num_bytes for move in moves)
