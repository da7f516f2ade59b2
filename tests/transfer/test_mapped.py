"""Mapped maps what is really the peer's, on this host, and takes its memory before anybody writes to it."""

import os
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore
from transfer.two_processes import rows_move

from memserve.clock import monotonic_ns
from memserve.transfer import Mapped
from memserve.transfer.directory import Directory, Endpoint, Memory
from memserve.transfer.shared_memory import SharedMemory, handle_of, host_id, reserve


@pytest.fixture
def alone():
    """(transport, store, shared memory), attached as endpoint 0 in a world of one."""
    store, memory = HashStore(), SharedMemory(4096)
    transport = Mapped(store)
    transport.attach(0, [memory.bytes, None])
    yield transport, store, memory
    transport.close()


def publish(store, number, host=None, pid=None, memory=None):
    entry = Endpoint(host or host_id(), pid or os.getpid(), [memory or Memory(4096)])
    Directory(store, "mapped").publish(number, entry)


def post(transport, target):
    transport.post((0, 0, 0), rows_move((0, 0), (target, 0), 64, [0], [1]), monotonic_ns())


def wait(transport):
    while not (arrived := transport.poll(0, monotonic_ns())):
        continue
    return arrived


def test_in_a_world_of_one_there_is_nobody_to_send_to(alone):
    for target, named in ((0, "expected one from 0 to another"), (1, "endpoint 1: expected one that is attached")):
        with pytest.raises(ValueError, match=named):
            post(alone[0], target)


def test_a_peer_on_another_host_is_refused_by_name(alone):
    transport, store, _ = alone
    publish(store, 1, host="elsewhere")
    with pytest.raises(ValueError, match="endpoint 1 is on host 'elsewhere', this one on .*: expected transport=gloo"):
        post(transport, 1)


def test_too_little_memory_is_refused_before_any_is_touched():
    transport, memory = Mapped(HashStore()), SharedMemory(2**43)
    with pytest.raises(MemoryError, match=f"{2**43} bytes, of which {2**43} are not in memory yet: .* are available"):
        transport.attach(0, [memory.bytes])
    transport.close()


def test_all_pages_are_taken_at_the_start_and_keep_what_they_hold():
    memory = SharedMemory(1 << 20)
    memory.bytes[5] = 9
    assert os.fstat(memory.handle.fd).st_blocks * 512 < 1 << 20
    reserve(memory.handle)
    assert os.fstat(memory.handle.fd).st_blocks * 512 == 1 << 20 and memory.bytes[5] == 9


def test_memory_that_is_not_shared_is_refused_by_name():
    transport, shared = Mapped(HashStore()), SharedMemory(4096)
    for memory in (torch.zeros(4096), shared.bytes[64:]):
        with pytest.raises(ValueError, match="memory 1 of endpoint 0 on cpu: expected all of a SharedMemory"):
            transport.attach(0, [None, memory])
    transport.close()


def test_a_handle_is_not_given_for_a_descriptor_that_is_another_files_by_now():
    memory = SharedMemory(4096)
    tensor, fd = memory.bytes, memory.handle.fd
    assert handle_of(tensor.view(torch.float16).view(2, 1024)) == memory.handle
    del memory
    assert handle_of(tensor) is None
    other = SharedMemory(4096)
    assert other.handle.fd == fd and handle_of(tensor) is None


@pytest.mark.parametrize("pid", [os.getpid(), 2**22 + 1], ids=["used again", "of nobody"])
def test_a_peer_that_is_gone_is_not_mapped_and_what_is_posted_to_it_is_over(alone, pid):
    """Neither a process number nor a descriptor that somebody else got since leads to their memory."""
    transport, store, _ = alone
    other = SharedMemory(4096)
    publish(store, 1, pid=pid, memory=Memory(4096, other.handle.fd, inode=1))
    post(transport, 1)
    assert [a.move_id for a in wait(transport)] == [(0, 0, 0)] and not other.bytes.any()


def test_rows_with_nothing_behind_them_arrive(alone):
    transport, store, _ = alone
    publish(store, 1, memory=Memory(-1))
    publish(store, 2, memory=Memory(4096))
    for target in (1, 2):
        transport.post((0, 0, target), rows_move((0, 1), (target, 0), 64, [999], [1]), monotonic_ns())
        assert [a.move_id for a in wait(transport)] == [(0, 0, target)]


def test_nothing_is_posted_before_attaching_nor_after_the_end():
    transport, store, memory = Mapped(HashStore()), HashStore(), SharedMemory(64)
    with pytest.raises(ValueError, match="a move from endpoint 0: expected this process to be attached"):
        post(transport, 1)
    transport.close()
    closed = Mapped(store)
    closed.attach(0, [memory.bytes, None])
    publish(store, 1)
    closed.close()
    with pytest.raises(ValueError, match="expected this process to be attached"):
        post(closed, 1)


def num_mappings(memory):
    """How often this process has the pages of a shared memory in its address space."""
    inode = os.fstat(memory.handle.fd).st_ino
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    return sum(int(fields[4]) == inode for fields in maps)


def test_who_is_prepared_for_is_mapped_before_anything_is_posted(alone):
    """As far as it is there, and on this host."""
    transport, store, _ = alone
    theirs, peer = SharedMemory(8192), Mapped(store)
    peer.attach(2, [theirs.bytes, None])
    publish(store, 1, host="elsewhere")
    assert num_mappings(theirs) == 1
    transport.prepare([1, 2, 3], 0.01)
    assert num_mappings(theirs) == 2
    post(transport, 2)
    assert [arrived.move_id for arrived in wait(transport)] == [(0, 0, 0)] and num_mappings(theirs) == 2
    peer.close()


def test_what_is_published_is_read_back():
    store = HashStore()
    publish(store, 4, host="h", pid=12, memory=Memory(64, 3, 99))
    assert Directory(store, "mapped").find(4) == Endpoint("h", 12, [Memory(64, 3, 99)])
    with pytest.raises(ValueError, match="endpoint 4 is attached already"):
        publish(store, 4)
