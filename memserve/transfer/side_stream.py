"""SideStream: copies on a GPU beside what computes there. Knows no copy."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """A GPU's stream for copies beside compute; they see what the thread that computes had given the GPU before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch does not annotate its streams

    def mark(self) -> torch.cuda.Event:
        """What the calling thread has given the GPU to do so far."""
        event: torch.cuda.Event = torch.cuda.current_stream(self._device).record_event()
        return event

    @contextmanager
    def after(self, mark: torch.cuda.Event | None) -> Iterator[None]:
        """What is launched within runs on this stream, once that is done; None: at once."""
        with torch.cuda.stream(self._stream):
            if mark is not None:
                self._stream.wait_event(mark)
            yield
