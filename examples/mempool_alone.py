"""An engine of your own on `memserve.kvcache` alone: no scheduler, no configuration, no model library.

    python examples/mempool_alone.py

Its "model" keeps each token's square as KV and answers with the sum of all it reads back, so a wrong block would show.
"""

import numpy as np
import torch

from memserve.kvcache import AggregatedLayout, CacheGeometry, MemPool, RadixIndex

GEOMETRY = CacheGeometry(num_layers=1, block_size=4, num_kv_heads=1, head_dim=1, dtype=torch.int64)


def answer(pool: MemPool, request_id: str, prompt: list[int]) -> tuple[int, int]:
    """The model's answer, and how many tokens of the prompt it found computed already."""
    me, tokens, size = ("request", request_id), np.array(prompt, dtype=np.int32), pool.block_size
    cached = pool.match(tokens)
    pool.retain(cached.addrs, holder=me)  # before anything else can evict it
    new = pool.alloc_mem(-(-len(tokens) // size) - len(cached.addrs), holder=me)
    table = pool.resolve(np.concatenate([cached.addrs, new]))
    positions = np.arange(len(tokens))
    blocks, offsets = table[positions // size], positions % size
    todo = slice(cached.num_tokens, len(tokens))
    pool.kv[0, 0, blocks[todo], offsets[todo], 0, 0] = torch.from_numpy(tokens[todo].astype(np.int64) ** 2)
    result = int(pool.kv[0, 0, blocks, offsets, 0, 0].sum())
    num_full = len(tokens) // size
    pool.insert(tokens[: num_full * size], pool.addresses(table[:num_full]), holder=me)  # it is computed: now share it
    pool.free_mem(pool.addresses(table), holder=me)  # what was inserted stays cached
    return result, cached.num_tokens


if __name__ == "__main__":
    pool = MemPool(GEOMETRY, AggregatedLayout(), num_blocks=8, index=RadixIndex)
    system_prompt = list(range(8))
    for number, turn in enumerate(([20, 21, 22], [20, 21, 22, 23, 24], [30])):
        total, num_cached = answer(pool, f"r{number}", system_prompt + turn)
        print(f"r{number}: {num_cached} of {len(system_prompt + turn)} tokens cached, answer {total}")
    pool.check()
    print(pool.stats())
