"""TransferCost: what sending KV between two instances costs, with a latency per call (section 5.3). Knows no transport.

The paper's Eq. 2 divides bytes by the bandwidth alone; then 10,000 calls of 32 KiB cost what one of 320 MiB does, and
its own Fig. 11 shows a factor of five between the two.
"""

from dataclasses import dataclass

from memserve.clock import to_s
from memserve.transfer.link import LinkModel

NUM_MESSAGES = 3  # one way each, before the first byte leaves and after the last: Fetch, Ask, Grant .. and Done
NUM_MESSAGES_AFTER = 1


@dataclass(frozen=True)
class TransferCost:
    """seconds = 4 messages + latency * calls + bytes / bandwidth, of a fetch.

    block_bytes, block_calls: of a block of KV, all layers, by the granularity in use (0 bytes: KV is not stored).
    call_per_transfer: calls that do not depend on the number of blocks.
    """

    link: LinkModel
    block_bytes: int
    block_calls: int
    calls_per_transfer: int = 0

    def fetch_time_s(self, num_blocks: int) -> float:
        """Seconds from asking until the KV of num_blocks blocks is usable here; 0 for none."""
        if num_blocks <= 0:
            return 0.0
        num_calls = self.calls_per_transfer + self.block_calls * num_blocks
        messages_ns = (NUM_MESSAGES + NUM_MESSAGES_AFTER) * self.link.message_ns
        return to_s(self.link.duration_ns(num_calls, self.block_bytes * num_blocks) + messages_ns)
