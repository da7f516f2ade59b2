"""Operations of torch, as the stand-in looks at them; and indexing, which has none of its own in Python's form."""

import operator
from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten
WAITS = {  # the host has to know what comes out
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
}


class Indexing:
    """Indexing as Python writes it, in the form of torch's own operations."""

    def __init__(self, call: Callable[..., Any], *, writes: bool) -> None:
        self._call, self.writes = call, writes

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def name(self) -> str:
        return self._call.__name__


INDEXED = Indexing(operator.getitem, writes=False)
ASSIGNED = Indexing(operator.setitem, writes=True)


def writes(func: Any) -> bool:
    """Whether it changes one of its arguments."""
    if isinstance(func, Indexing):
        return func.writes
    return any(r.alias_info is not None and r.alias_info.is_write for r in func._schema.returns)


def is_view(func: Any) -> bool:
    return not isinstance(func, Indexing) and any(r.alias_info is not None for r in func._schema.returns)
