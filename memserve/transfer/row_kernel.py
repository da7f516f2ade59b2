"""Rows copied between tensors of one GPU by one kernel: block gather, scatter, and both at once. Knows bytes only."""

from __future__ import annotations

import torch

from memserve.jit import KernelLaunch, RowConfig, jit, tl

ROW_COPY = RowConfig(1024, 4)
_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


@jit("source_rows_ptr", "target_rows_ptr")
def _row_copy_kernel(
    source_ptr: tl.tensor, source_rows_ptr: tl.tensor, target_ptr: tl.tensor, target_rows_ptr: tl.tensor,
    row_words: tl.tensor, BLOCK_WORDS: tl.constexpr,
) -> None:  # fmt: skip
    num_parts = tl.cdiv(row_words, BLOCK_WORDS)  # those of a row in turn: memory is read fastest in order
    i, part = tl.program_id(0) // num_parts, tl.program_id(0) % num_parts
    words = part * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    mask = words < row_words
    source_row, target_row = tl.load(source_rows_ptr + i), tl.load(target_rows_ptr + i)  # int64
    row = tl.load(source_ptr + source_row * row_words + words, mask=mask)
    tl.store(target_ptr + target_row * row_words + words, row, mask=mask)


def row_copy_launch(
    source_N: torch.Tensor,
    source_rows: torch.Tensor,
    target_N: torch.Tensor,
    target_rows: torch.Tensor,
    row_bytes: int,
    config: RowConfig = ROW_COPY,
) -> KernelLaunch:
    """Copies rows of `source_N` to rows of `target_N`, both uint8 [bytes] of one device, rows of row_bytes each.

    source_rows, target_rows: int64 [n], in range; no row is in both where the tensors share memory.
    """
    starts = (row_bytes, source_N.storage_offset(), target_N.storage_offset(), source_N.numel(), target_N.numel())
    size, dtype = next((size, dtype) for size, dtype in _WORDS if all(start % size == 0 for start in starts))
    row_words = row_bytes // size
    args = {
        "source_ptr": source_N.view(dtype), "source_rows_ptr": source_rows, "target_ptr": target_N.view(dtype),
        "target_rows_ptr": target_rows, "row_words": row_words,
    }  # fmt: skip
    constants = {"BLOCK_WORDS": config.block_elements}
    grid = (len(source_rows) * -(-row_words // config.block_elements),)
    return KernelLaunch(_row_copy_kernel, grid, args, constants, config.num_warps, 1, fp_fusion=False)
