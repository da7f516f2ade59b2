"""Copies of rows between tensors. The one place that knows how that is done fast on each device.

On a CPU NumPy views of the bytes copy scattered rows several times faster than torch's indexing does.
"""

import numpy as np
import torch

_WIDE_BYTES = 8


def copy_rows(
    source: torch.Tensor, source_rows: np.ndarray, target: torch.Tensor, target_rows: np.ndarray, row_bytes: int
) -> None:
    """Copies rows of `source` to rows of `target`, both contiguous and seen as [num_rows, row_bytes].

    source_rows, target_rows: int64 [n]. Raises IndexError for a row outside, with some rows copied.
    """
    if not len(source_rows):
        return
    if source.device.type == target.device.type == "cpu":
        _as_rows(target, row_bytes)[target_rows] = _as_rows(source, row_bytes)[source_rows]
        return
    picked = _bytes(source).view(-1, row_bytes)[torch.from_numpy(source_rows).to(source.device)]
    rows = torch.from_numpy(target_rows).to(target.device)
    _bytes(target).view(-1, row_bytes)[rows] = picked.to(target.device)


def _as_rows(tensor: torch.Tensor, row_bytes: int) -> np.ndarray:
    """The tensor's memory as [num_rows, elements], in elements as wide as the row allows."""
    dtype = np.int64 if row_bytes % _WIDE_BYTES == 0 else np.uint8
    rows: np.ndarray = _bytes(tensor).numpy().view(dtype).reshape(-1, row_bytes // np.dtype(dtype).itemsize)
    return rows


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.is_contiguous(), "rows are counted through contiguous memory"
    return tensor.view(-1).view(torch.uint8)
