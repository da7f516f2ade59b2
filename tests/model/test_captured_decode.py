"""What of CUDA graphs can be told without a GPU: buckets and their padding. A padded step is in check_captured.py."""

import numpy as np
import torch
from mini_engine import MiniEngine
from small_models import SMALL, random_model

from memserve.model.batch import build_forward_batch
from memserve.model.captured_decode import BUCKETS, StaticInputs, bucket_of
from memserve.request import ScheduledBatch

CPU = torch.device("cpu")


def test_a_batch_takes_the_smallest_bucket_that_holds_it() -> None:
    for num_requests in range(1, BUCKETS[-1] + 1):
        bucket = bucket_of(num_requests)
        assert BUCKETS[bucket] >= num_requests and (bucket == 0 or BUCKETS[bucket - 1] < num_requests)


def test_rows_past_the_batch_are_padding_whatever_was_there_before() -> None:
    engine = MiniEngine(random_model(SMALL, seed=0), 4)
    requests = [engine.request(prompt, max_tokens=4) for prompt in ([5, 6, 7], [8, 9], [10] * 9)]
    engine.step(requests, [3, 2, 9])
    for request in requests:
        request.block_table.append(50)
    inputs = StaticInputs(8, max_blocks=6, device=CPU)
    for chosen in (requests, requests[1:2]):
        batch = build_forward_batch(ScheduledBatch(chosen, [1] * len(chosen)), 4, CPU)
        inputs.fill(batch)
        n, width = len(chosen), batch.block_tables.shape[1]
        assert inputs.facts[:, n:].tolist() == [[-1] * (8 - n), [0] * (8 - n), [0] * (8 - n)]
        assert np.array_equal(inputs.facts[:, :n].numpy(), [batch.slot_mapping, batch.seq_lens, batch.positions])
        assert torch.equal(inputs.tables[:n, :width], batch.block_tables_RM)
        assert torch.equal(inputs.token_ids[:n], batch.token_ids)
