"""Head parts: which rank of one instance sends which kv heads to which rank of another. Knows no block and no byte.

Rank r of n holds heads [r * K / n, (r + 1) * K / n) of the model's K, so between instances of 1 and of 2 ranks

    1 -> 2    rank 0: heads [0, K/2) to rank 0, heads [K/2, K) to rank 1
    2 -> 1    rank 0: all of its heads to the first half of rank 0's; rank 1: all of its heads to the second half

and between as many ranks each sends all that it has to its peer. Every rank is a transport's endpoint of its own.
"""

from dataclasses import dataclass

from memserve.kvcache.address import INCARNATION_BITS


@dataclass(frozen=True)
class HeadPart:
    """`num_heads` heads: from `source_first` on among the source rank's, from `target_first` on among the target's."""

    source_rank: int
    target_rank: int
    source_first: int
    target_first: int
    num_heads: int


def head_parts(num_kv_heads: int, num_source_ranks: int, num_target_ranks: int) -> list[HeadPart]:
    """The parts of a transfer between two instances, by source rank. num_kv_heads: of the whole model.

    Raises ValueError unless one number of ranks divides the other, and both divide the heads.
    """
    few, many = sorted((num_source_ranks, num_target_ranks))
    if few < 1 or many % few or num_kv_heads % many:
        raise ValueError(
            f"{num_kv_heads} kv heads from {num_source_ranks} to {num_target_ranks} ranks: "
            "expected that one number divides the other, and both the heads"
        )
    count = num_kv_heads // many
    per_source, per_target = num_kv_heads // num_source_ranks, num_kv_heads // num_target_ranks
    firsts = range(0, num_kv_heads, count)
    return [HeadPart(h // per_source, h // per_target, h % per_source, h % per_target, count) for h in firsts]


def endpoint_of(incarnation: int, rank: int) -> int:
    """The transport's number of an instance's rank: the incarnation itself for the leader."""
    return rank << INCARNATION_BITS | incarnation


def rank_of_endpoint(endpoint: int) -> int:
    """The rank within its instance."""
    return endpoint >> INCARNATION_BITS
