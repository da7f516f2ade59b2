"""ForwardBatch: a ScheduledBatch as arrays and tensors. Knows no model and no attention backend.

Shape legend: T tokens in the step, packed without padding; R requests; M blocks of the widest table; S sampled rows.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from memserve.request import ScheduledBatch
from memserve.transfer.block_copy import to_device


@dataclass(frozen=True, eq=False)
class ForwardBatch:
    """What one step computes, request after request; request i owns the rows [query_starts[i], query_starts[i + 1]).

    All arrays are int64. Arrays are on the host, where block tables come from; the tensors of the same facts below
    are made once, on first use, on `device`.

    positions: [T] index of each token in its request.
    slot_mapping: [T] where its KV is written: block * block_size + offset.
    block_tables: [R, M] block numbers; entries past a request's last block are 0 and mean nothing.
    query_starts: [R + 1] first row of each request.  seq_lens: [R] tokens of KV a request has once this step is done.
    sample_rows: [S] rows whose logits are needed.
    token_ids: int64 tensor [T] on `device`: it is a tensor because in a run of decode steps it never leaves there.
    """

    token_ids: torch.Tensor
    positions: np.ndarray
    slot_mapping: np.ndarray
    block_tables: np.ndarray
    query_starts: np.ndarray
    seq_lens: np.ndarray
    sample_rows: np.ndarray
    block_size: int
    device: torch.device

    @property
    def num_requests(self) -> int:
        return len(self.seq_lens)

    @property
    def num_tokens(self) -> int:
        return len(self.positions)

    @property
    def decode_only(self) -> bool:
        """Whether every request computes one token."""
        return self.num_tokens == self.num_requests

    @property
    def samples_all(self) -> bool:
        """Whether every row of a decode step does, in their order."""
        return len(self.sample_rows) == self.num_tokens

    @cached_property
    def positions_T(self) -> torch.Tensor:
        return self._tensor(self.positions)

    @cached_property
    def slot_mapping_T(self) -> torch.Tensor:
        return self._tensor(self.slot_mapping)

    @cached_property
    def block_tables_RM(self) -> torch.Tensor:
        return self._tensor(self.block_tables)

    @cached_property
    def query_starts_R1(self) -> torch.Tensor:
        return self._tensor(self.query_starts)

    @cached_property
    def seq_lens_R(self) -> torch.Tensor:
        return self._tensor(self.seq_lens)

    @cached_property
    def sample_rows_S(self) -> torch.Tensor:
        return self._tensor(self.sample_rows)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return to_device(array, self.device)

    def next_step(self, token_ids_R: torch.Tensor) -> "ForwardBatch":
        """The decode step after this one (itself a decode step): token_ids_R int64 [R] are what it sampled."""
        assert self.decode_only and self.samples_all
        positions = self.positions + 1
        return ForwardBatch(
            token_ids=token_ids_R,
            positions=positions,
            slot_mapping=_slots(self.block_tables, np.arange(self.num_requests), positions, self.block_size),
            block_tables=self.block_tables,
            query_starts=self.query_starts,
            seq_lens=self.seq_lens + 1,
            sample_rows=self.sample_rows,
            block_size=self.block_size,
            device=self.device,
        )


def build_forward_batch(batch: ScheduledBatch, block_size: int, device: torch.device) -> ForwardBatch:
    """The first step of `batch`. The block tables are wide enough for all of its `num_steps`."""
    num_new = np.array(batch.num_new, dtype=np.int64)
    num_computed = np.array([r.num_computed for r in batch.requests], dtype=np.int64)
    num_tokens = np.array([r.num_tokens for r in batch.requests], dtype=np.int64)
    assert (num_new >= 1).all() and (num_computed + num_new <= num_tokens).all()
    assert batch.num_steps == 1 or ((num_new == 1).all() and (num_computed + 1 == num_tokens).all())
    query_starts = np.zeros(len(num_new) + 1, dtype=np.int64)
    np.cumsum(num_new, out=query_starts[1:])
    seq_lens = num_computed + num_new
    positions = np.arange(query_starts[-1]) + np.repeat(num_computed - query_starts[:-1], num_new)
    rows = np.repeat(np.arange(len(num_new)), num_new)
    block_tables = _block_tables(batch, -(-(seq_lens + batch.num_steps - 1) // block_size))
    tokens = [r.tokens.view[c:n] for r, c, n in zip(batch.requests, num_computed, seq_lens, strict=True)]
    return ForwardBatch(
        token_ids=to_device(np.concatenate(tokens).astype(np.int64), device),
        positions=positions,
        slot_mapping=_slots(block_tables, rows, positions, block_size),
        block_tables=block_tables,
        query_starts=query_starts,
        seq_lens=seq_lens,
        sample_rows=(query_starts[1:] - 1)[seq_lens == num_tokens],
        block_size=block_size,
        device=device,
    )


def _block_tables(batch: ScheduledBatch, num_blocks: np.ndarray) -> np.ndarray:
    """int64 [R, M]: the first num_blocks[i] blocks of each request, then zeros."""
    tables = np.zeros((len(num_blocks), int(num_blocks.max())), dtype=np.int64)
    for row, request, n in zip(tables, batch.requests, num_blocks.tolist(), strict=True):
        assert len(request.block_table) >= n, f"{request.request_id}: {len(request.block_table)} blocks, needs {n}"
        row[:n] = request.block_table.view[:n]
    return tables


def _slots(block_tables: np.ndarray, rows: np.ndarray, positions: np.ndarray, block_size: int) -> np.ndarray:
    """int64 [T]: the slot of each (request row, position)."""
    block, offset = np.divmod(positions, block_size)
    slots: np.ndarray = block_tables[rows, block] * block_size + offset
    return slots
