"""Shared memory: bytes that another process of this host can map, without a name in any file system.

A memfd (an unlinked temporary file where the system has none): it goes with its last user, and /dev/shm, often tiny in
a container, is not involved. Knows no KV. The owner keeps one file descriptor open for as long as it lives.
"""

import os
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class SharedHandle:
    """Names memory to another process of this host and user: `num_bytes` behind descriptor `fd` of process `pid`."""

    pid: int
    fd: int
    num_bytes: int

    def attach(self) -> torch.Tensor:
        """The same bytes, uint8 [num_bytes]; they stay mapped while the tensor lives.

        Linux only. Raises OSError when the owner is gone or belongs to somebody else.
        """
        path = Path(f"/proc/{self.pid}/fd/{self.fd}")
        if path.stat().st_size < self.num_bytes:
            raise OSError(f"{path}: expected at least {self.num_bytes} bytes, as when it was shared")
        return _mapped(str(path), self.num_bytes)


class SharedMemory:
    """`num_bytes` (>= 1) zero bytes.  bytes: uint8 [num_bytes].  handle: what another process attaches to.

    The descriptor closes with this object, and the memory goes with the last tensor that looks at it. Raises OSError.
    """

    def __init__(self, num_bytes: int) -> None:
        fd = _unnamed_file()
        try:
            os.ftruncate(fd, num_bytes)
            self.bytes = _mapped(f"/dev/fd/{fd}", num_bytes)
        except BaseException:
            os.close(fd)
            raise
        self.handle = SharedHandle(os.getpid(), fd, num_bytes)
        weakref.finalize(self, os.close, fd)


def handle_of(memory: torch.Tensor) -> SharedHandle | None:
    """By what another process reaches all of a contiguous tensor, if it fills a SharedMemory that lives; else None."""
    storage = memory.untyped_storage()
    name = storage.filename if memory.device.type == "cpu" else None
    if name is None or not name.startswith("/dev/fd/") or memory.storage_offset():
        return None
    file = Path(name)
    if not file.exists() or file.stat().st_ino != _inode_at(memory.data_ptr()):  # closed; its number may be another's
        return None
    return SharedHandle(os.getpid(), int(file.name), memory.numel() * memory.itemsize)


def reserve(handle: SharedHandle) -> None:
    """Takes every page of this process's own shared memory now, contents unchanged, not at the first write to it.

    Raises MemoryError, naming the bytes, when there are too few.
    """
    missing = handle.num_bytes - 512 * os.fstat(handle.fd).st_blocks
    available = available_bytes()
    wish = f"shared memory of {handle.num_bytes} bytes, of which {missing} are not in memory yet"
    if available is not None and missing > available:
        raise MemoryError(f"{wish}: {available} are available")
    try:
        os.posix_fallocate(handle.fd, 0, handle.num_bytes)
    except OSError as error:
        raise MemoryError(f"{wish}: {error}") from error


def page_lock(memory: SharedMemory) -> None:
    """Takes all of its pages and keeps them where they are, so that a GPU copies from and to them by itself.

    For as long as the object lives. Raises RuntimeError without a GPU, and where the system does not allow as much.
    """
    runtime, address = torch.cuda.cudart(), memory.bytes.data_ptr()  # type: ignore[no-untyped-call] # torch does not annotate cudart()
    torch.cuda.check_error(runtime.cudaHostRegister(address, memory.bytes.numel(), 0))
    weakref.finalize(memory, runtime.cudaHostUnregister, address)


def host_id() -> str:
    """The same for processes that can map each other's shared memory: of one boot and one set of process numbers."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"


def available_bytes() -> int | None:
    """Memory that this host can still give without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except FileNotFoundError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _unnamed_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("memserve", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _inode_at(address: int) -> int | None:
    """The inode of the file that is mapped at an address of this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, inode = line.split(maxsplit=5)[:5]
        first, end = (int(bound, 16) for bound in span.split("-"))
        if first <= address < end:
            return int(inode)
    return None


def _mapped(path: str, num_bytes: int) -> torch.Tensor:
    return torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)
