"""Copies of rows between tensors. The one place that knows how that is done fast on each device.

On a CPU NumPy views of the bytes copy scattered rows several times faster than torch's indexing does. Wide runs of
neighbours are copied one by one; narrow rows are gathered and scattered through a buffer that stays in the processor's
cache, by two calls for many rows: a call gives up the interpreter's lock, and who has to take it back for every row
makes no progress beside a busy thread. Within one GPU a kernel copies rows from and to where they lie (row_kernel.py),
also to a peer's memory that is opened as this GPU's; between a GPU and the host they go through page-locked buffers.
"""

from dataclasses import dataclass

import numpy as np
import torch

from memserve.jit import runs_on
from memserve.transfer.row_kernel import row_copy_launch

_FEW_BYTES = 1 << 16  # up to here any way will do
_WIDE_BYTES = 1 << 16  # runs from here on are copied one by one
_BUFFER_BYTES = 1 << 20
_STAGING_BYTES = 64 << 20  # between a device and the host, at once


@dataclass(frozen=True)
class RowRuns:
    """Paired rows as runs of neighbours at both ends. source, target, lengths: int64 [num_runs], in rows."""

    source: np.ndarray
    target: np.ndarray
    lengths: np.ndarray

    @staticmethod
    def of(source_rows: np.ndarray, target_rows: np.ndarray) -> "RowRuns":
        """source_rows, target_rows: int64 [n], n >= 1."""
        starts = np.concatenate([[0], np.flatnonzero(_apart(source_rows, target_rows)) + 1])
        lengths = np.diff(starts, append=len(source_rows))
        return RowRuns(source_rows[starts], target_rows[starts], lengths)


def copy_rows(
    source: torch.Tensor, source_rows: np.ndarray, target: torch.Tensor, target_rows: np.ndarray, row_bytes: int
) -> None:
    """Copies rows of `source` to rows of `target`, both contiguous and seen as [num_rows, row_bytes].

    source_rows, target_rows: int64 [n], >= 0; no row is in both where the tensors share memory. On any devices; done
    when it returns. Raises IndexError for a row outside, with nothing copied on a CPU.
    """
    if not len(source_rows):
        return
    if source.device.type == target.device.type == "cpu":
        _copy_on_cpu(source, source_rows, target, target_rows, row_bytes)
        return
    if "cpu" in (source.device.type, target.device.type):
        copy_staged(source, source_rows, target, target_rows, row_bytes)
        return
    if source.device == target.device and runs_on(source.device):
        picks, rows = to_device(np.stack((source_rows, target_rows)), source.device)  # in one copy
        row_copy_launch(as_bytes(source), picks, as_bytes(target), rows, row_bytes).run()
    else:
        picked = _rows_on_device(source, row_bytes)[to_device(source_rows, source.device)]
        _rows_on_device(target, row_bytes)[to_device(target_rows, target.device)] = picked.to(target.device)
    if target.device.type == "cuda":
        torch.cuda.current_stream(target.device).synchronize()


def copy_staged(
    source: torch.Tensor, source_rows: np.ndarray, target: torch.Tensor, target_rows: np.ndarray, row_bytes: int
) -> None:
    """As `copy_rows`, piece by piece: gathered into a page-locked buffer, copied as one, scattered."""
    rows_at_once = max(1, _STAGING_BYTES // row_bytes)
    num_bytes = min(rows_at_once, len(source_rows)) * row_bytes
    pinned = "cuda" in (source.device.type, target.device.type)
    staging = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
    for start in range(0, len(source_rows), rows_at_once):
        rows = slice(start, start + rows_at_once)
        piece = staging[: len(source_rows[rows]) * row_bytes]
        gather_rows(source, source_rows[rows], piece, row_bytes)
        scatter_rows(piece, target, target_rows[rows], row_bytes)


def gather_rows(memory: torch.Tensor, rows: np.ndarray, buffer: torch.Tensor, row_bytes: int) -> None:
    """Copies rows (int64 [n]) of `memory` to `buffer`, uint8 [n * row_bytes], on any device; done when it returns."""
    if memory.device.type == buffer.device.type == "cpu":
        memory_N, buffer_N = as_bytes(memory).numpy(), buffer.numpy()
        if row_bytes >= _WIDE_BYTES:
            _copy_wide(memory_N, rows, buffer_N, np.arange(len(rows)), row_bytes)
        else:
            np.take(_as_rows(memory_N, row_bytes), rows, out=_as_rows(buffer_N, row_bytes), mode="clip")
        return
    if memory.device == buffer.device and runs_on(memory.device):
        copy_rows(memory, rows, buffer, np.arange(len(rows)), row_bytes)
        return
    buffer.view(-1, row_bytes).copy_(_picked(memory, rows, row_bytes))


def scatter_rows(buffer: torch.Tensor, memory: torch.Tensor, rows: np.ndarray, row_bytes: int) -> None:
    """Copies `buffer`, uint8 [n * row_bytes], to rows (int64 [n]) of `memory`, on any device; done when it returns."""
    if memory.device.type == buffer.device.type == "cpu":
        memory_N, buffer_N = as_bytes(memory).numpy(), buffer.numpy()
        if row_bytes >= _WIDE_BYTES:
            _copy_wide(buffer_N, np.arange(len(rows)), memory_N, rows, row_bytes)
        else:
            _as_rows(memory_N, row_bytes)[rows] = _as_rows(buffer_N, row_bytes)
        return
    copy_rows(buffer.to(memory.device), np.arange(len(rows)), memory, rows, row_bytes)


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy on `device`; to a GPU through pinned memory, so that nobody waits for it. To a CPU, its memory."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def are_neighbours(rows: np.ndarray) -> bool:
    """Whether rows (int64 [n]) follow each other."""
    return len(rows) == 1 or bool((np.diff(rows) == 1).all())


def _picked(memory: torch.Tensor, rows: np.ndarray, row_bytes: int) -> torch.Tensor:
    """Rows of a device's memory, [n, row_bytes]; a view where they are neighbours."""
    memory_NR = _rows_on_device(memory, row_bytes)
    if len(rows) and are_neighbours(rows):
        return memory_NR[int(rows[0]) : int(rows[0]) + len(rows)]
    return memory_NR[torch.from_numpy(rows).to(memory.device)]


def _rows_on_device(memory: torch.Tensor, row_bytes: int) -> torch.Tensor:
    """[num_rows, row_bytes], a view; what is left of the memory is no row."""
    memory_N = as_bytes(memory)
    return memory_N[: len(memory_N) // row_bytes * row_bytes].view(-1, row_bytes)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor, uint8 [num_bytes]."""
    assert tensor.is_contiguous(), "rows are counted through contiguous memory"
    return tensor if tensor.dtype == torch.uint8 and tensor.dim() == 1 else tensor.view(-1).view(torch.uint8)


def _apart(source_rows: np.ndarray, target_rows: np.ndarray) -> np.ndarray:
    """bool [n - 1]: whether a pair of rows does not go on where the pair before it ended."""
    apart: np.ndarray = (source_rows[1:] - source_rows[:-1] != 1) | (target_rows[1:] - target_rows[:-1] != 1)
    return apart


def _copy_on_cpu(
    source: torch.Tensor, source_rows: np.ndarray, target: torch.Tensor, target_rows: np.ndarray, row_bytes: int
) -> None:
    source_N, target_N = as_bytes(source).numpy(), as_bytes(target).numpy()  # N bytes
    if len(source_rows) * row_bytes <= _FEW_BYTES:
        _as_rows(target_N, row_bytes)[target_rows] = _as_rows(source_N, row_bytes)[source_rows]
        return
    for rows, memory_N in ((source_rows, source_N), (target_rows, target_N)):
        if not 0 <= int(rows.min()) <= int(rows.max()) < len(memory_N) // row_bytes:
            raise IndexError(f"rows from {rows.min()} to {rows.max()}: expected 0 to {len(memory_N) // row_bytes - 1}")
    if row_bytes >= _WIDE_BYTES:
        _copy_wide(source_N, source_rows, target_N, target_rows, row_bytes)
        return
    num_runs = 1 + np.count_nonzero(_apart(source_rows, target_rows))
    if len(source_rows) * row_bytes >= num_runs * _WIDE_BYTES:
        _copy_runs(source_N, target_N, RowRuns.of(source_rows, target_rows), row_bytes)
    else:
        _copy_narrow(source_N, source_rows, target_N, target_rows, row_bytes)


def _copy_wide(
    source_N: np.ndarray, source_rows: np.ndarray, target_N: np.ndarray, target_rows: np.ndarray, row_bytes: int
) -> None:
    """Row by row: neighbours found first would save less than finding them costs."""
    for start, to in zip((source_rows * row_bytes).tolist(), (target_rows * row_bytes).tolist(), strict=True):
        target_N[to : to + row_bytes] = source_N[start : start + row_bytes]


def _copy_runs(source_N: np.ndarray, target_N: np.ndarray, runs: RowRuns, row_bytes: int) -> None:
    for start, to, length in zip(runs.source.tolist(), runs.target.tolist(), runs.lengths.tolist(), strict=True):
        num_bytes = length * row_bytes
        target_N[to * row_bytes : to * row_bytes + num_bytes] = source_N[start * row_bytes :][:num_bytes]


def _copy_narrow(
    source_N: np.ndarray, source_rows: np.ndarray, target_N: np.ndarray, target_rows: np.ndarray, row_bytes: int
) -> None:
    whole_source, whole_target = _as_rows(source_N, row_bytes), _as_rows(target_N, row_bytes)
    rows_at_once = max(1, _BUFFER_BYTES // row_bytes)
    buffer = np.empty(min(rows_at_once, len(source_rows)), whole_source.dtype)
    for start in range(0, len(source_rows), rows_at_once):
        rows = slice(start, start + rows_at_once)
        picked = buffer[: len(source_rows[rows])]
        np.take(whole_source, source_rows[rows], out=picked, mode="clip")  # in range: checked before
        whole_target[target_rows[rows]] = picked


def _as_rows(memory_N: np.ndarray, row_bytes: int) -> np.ndarray:
    """[num_rows], each row one element of a type that NumPy moves whole."""
    rows: np.ndarray = memory_N[: len(memory_N) // row_bytes * row_bytes].view(np.dtype((np.void, row_bytes)))
    return rows
