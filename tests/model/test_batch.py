"""ForwardBatch: the arrays of a step."""

import numpy as np
import torch

from memserve.model.batch import build_forward_batch
from memserve.request import Request, ScheduledBatch
from memserve.sampling_params import SamplingParams


def request(num_tokens: int, num_computed: int, blocks: list[int]) -> Request:
    made = Request("r", np.arange(100, 100 + num_tokens, dtype=np.int32), SamplingParams())
    made.num_computed = num_computed
    made.block_table.extend(np.array(blocks, dtype=np.int32))
    return made


def test_rows_of_a_mixed_batch_are_packed_without_padding() -> None:
    requests = [request(10, 6, [5, 2, 9]), request(6, 5, [7, 3, 4]), request(8, 0, [1, 0])]
    batch = build_forward_batch(ScheduledBatch(requests, [3, 1, 8]), 4, torch.device("cpu"))
    assert batch.token_ids.tolist() == [106, 107, 108, 105, *range(100, 108)]
    assert batch.positions.tolist() == [6, 7, 8, 5, *range(8)]
    assert batch.slot_mapping.tolist() == [10, 11, 36, 13, 4, 5, 6, 7, 0, 1, 2, 3]
    assert batch.query_starts.tolist() == [0, 3, 4, 12] and batch.seq_lens.tolist() == [9, 6, 8]
    assert batch.sample_rows.tolist() == [3, 11] and not batch.decode_only
    assert batch.block_tables.tolist() == [[5, 2, 9], [7, 3, 0], [1, 0, 0]]


def test_next_step_moves_every_request_by_one_token_across_block_borders() -> None:
    requests = [request(8, 7, [5, 2, 9]), request(6, 5, [7, 3])]
    first = build_forward_batch(ScheduledBatch(requests, [1, 1], num_steps=2), 4, torch.device("cpu"))
    assert first.decode_only and first.block_tables.tolist() == [[5, 2, 9], [7, 3, 0]]
    second = first.next_step(torch.tensor([41, 42]))
    assert second.token_ids.tolist() == [41, 42] and second.positions.tolist() == [8, 6]
    assert second.slot_mapping.tolist() == [36, 14] and second.seq_lens.tolist() == [9, 7]


def test_tensors_carry_the_same_facts_as_the_arrays() -> None:
    batch = build_forward_batch(ScheduledBatch([request(5, 0, [2, 1])], [5]), 4, torch.device("cpu"))
    for name in ("positions", "slot_mapping"):
        assert getattr(batch, f"{name}_T").tolist() == getattr(batch, name).tolist()
    assert batch.block_tables_RM.tolist() == [[2, 1]] and batch.query_starts_R1.tolist() == [0, 5]
    assert batch.seq_lens_R.tolist() == [5] and batch.sample_rows_S.tolist() == [4]
