"""SideStream: copies on a GPU beside what computes there; NoStream: on the host. Know no copy."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


class Beside(ABC):
    """Copies beside compute: they see what the thread that computes had given the device before."""

    @abstractmethod
    def mark(self) -> torch.cuda.Event | None:
        """What the calling thread has given the device to do so far."""

    @abstractmethod
    def after(self, mark: torch.cuda.Event | None) -> AbstractContextManager[None]:
        """What is launched within runs beside compute, once that is done; None: at once."""


class NoStream(Beside):
    """The host's memory: what is written is there."""

    def mark(self) -> None:
        return None

    def after(self, mark: torch.cuda.Event | None) -> AbstractContextManager[None]:
        return nullcontext()


class SideStream(Beside):
    """A GPU's stream for copies."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, new_stream(device)

    def mark(self) -> torch.cuda.Event:
        event: torch.cuda.Event = torch.cuda.current_stream(self._device).record_event()
        return event

    @contextmanager
    def after(self, mark: torch.cuda.Event | None) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            if mark is not None:
                self._stream.wait_event(mark)
            yield


def beside(device: torch.device) -> Beside:
    """For copies of a device's memory."""
    return SideStream(device) if device.type == "cuda" else NoStream()


def new_stream(device: torch.device) -> torch.cuda.Stream:
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch does not annotate its streams
    return stream
