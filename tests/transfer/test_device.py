"""What Mapped does for memory of a GPU, with a stand-in for it; and what only a GPU can show, where there is one."""

import gc
import os
import threading
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.distributed import HashStore, TCPStore
from transfer.two_processes import LIMIT_S, ON_GPU, Peer, StandIn, rows_move

from memserve.clock import monotonic_ns
from memserve.transfer import Mapped, mapped
from memserve.transfer.block_copy import copy_rows, copy_staged
from memserve.transfer.device import DeviceHandle, Gpu, NoDevice
from memserve.transfer.directory import Directory, Endpoint, Memory
from memserve.transfer.liveness import started_at
from memserve.transfer.mapped import PeerMemoryFailed
from memserve.transfer.shared_memory import SharedMemory, host_id
from memserve.transfer.side_stream import NoStream

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: run scripts/gpu_check.sh on one")
NOWHERE = DeviceHandle("stand-in", b"1 999999", 0, 4096, b"", 0)


class Ends:
    """Endpoints 0, 1, ... of one process, each on a device of its own."""

    def __init__(self, *devices):
        self.store, self.memories = HashStore(), [SharedMemory(4096) for _ in devices]
        self.transports = [Mapped(self.store, device=device) for device in devices]
        for number, transport in enumerate(self.transports):
            transport.attach(number, [self.memories[number].bytes])

    def publish(self, number, handle, pid=None):
        pid = pid or os.getpid()
        entry = Endpoint(host_id(), pid, [Memory(4096, on_device=handle)], started=started_at(pid))
        Directory(self.store, "mapped").publish(number, entry)

    def post(self, source, target):
        move = rows_move((source, 0), (target, 0), 64, [0], [1])
        self.transports[source].post((source, 0, 0), move, monotonic_ns())

    def wait(self, number):
        end_ns = monotonic_ns() + LIMIT_S * 10**9
        while not (arrived := self.transports[number].poll(number, monotonic_ns())):
            assert monotonic_ns() < end_ns, "nothing has arrived"
        return arrived

    def close(self):
        threads = [threading.Thread(target=transport.close) for transport in self.transports]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT_S)


@pytest.fixture
def ends(request):
    made = Ends(*(device() for device in request.param))
    yield made
    made.close()


both_on_device = pytest.mark.parametrize("ends", [(StandIn, StandIn)], indirect=True)


class BusySide(NoStream):
    """Its caller's work is done when somebody says so."""

    def __init__(self):
        self.is_done, self.num_after = threading.Event(), 0

    def mark(self):
        return self.is_done

    @contextmanager
    def after(self, mark):
        mark.wait(LIMIT_S)
        yield
        self.num_after += 1


class Busy(StandIn):
    def __init__(self):
        self.side = BusySide()


@pytest.mark.parametrize("ends", [(Busy, StandIn)], indirect=True)
def test_rows_are_read_when_the_device_has_done_what_it_was_given_before_the_post(ends):
    side = ends.transports[0]._device.side
    ends.post(0, 1)
    assert ends.transports[0].poll(0, monotonic_ns()) == []
    ends.memories[0].bytes[:64] = 7  # what the device was busy with
    side.is_done.set()
    ends.wait(0)
    assert ends.memories[1].bytes[64:128].eq(7).all() and side.num_after == 1


@both_on_device
def test_memory_lives_until_no_peer_maps_it(ends, monkeypatch):
    monkeypatch.setattr(mapped, "_LEAVING_S", LIMIT_S)
    ends.post(0, 1)
    ends.wait(0)
    memory = weakref.ref(ends.memories[1].bytes)
    ends.memories.pop()
    closing = threading.Thread(target=ends.transports[1].close)
    closing.start()
    closing.join(0.1)
    gc.collect()
    assert closing.is_alive() and memory() is not None
    ends.transports[0].detach(1)
    closing.join(LIMIT_S)
    gc.collect()
    assert not closing.is_alive() and memory() is None


@both_on_device
def test_what_a_copy_failed_with_keeps_no_peer_s_memory(ends, monkeypatch):
    opened = []

    def failing(source, source_rows, target, target_rows, row_bytes):
        opened.append(weakref.ref(target))
        raise RuntimeError("unspecified launch failure")

    monkeypatch.setattr(mapped, "copy_rows", failing)
    ends.post(0, 1)
    with pytest.raises(PeerMemoryFailed, match="unspecified launch failure"):
        ends.wait(0)
    ends.transports[0].detach(1)
    gc.collect()
    assert opened[0]() is None


@both_on_device
def test_memory_of_a_peer_that_has_closed_is_not_mapped(ends):
    ends.transports[1].close()
    ends.post(0, 1)
    assert [a.move_id for a in ends.wait(0)] == [(0, 0, 0)] and not ends.memories[1].bytes.any()


def test_a_visitor_that_has_ended_or_left_keeps_nobody():
    directory = Directory(HashStore(), "mapped")
    for number, pid in ((0, os.getpid()), (1, os.getpid()), (2, 2**22 + 1)):
        directory.publish(number, Endpoint(host_id(), pid, [], started=started_at(pid)))
    assert directory.visitors(0) == []
    assert directory.enter(0, 1) and directory.enter(0, 2)
    assert directory.visitors(0) == [1]
    directory.leave(0, 1)
    directory.shut(0)
    assert directory.visitors(0) == [] and not directory.enter(0, 1) and directory.visitors(0) == []


@both_on_device
def test_memory_that_cannot_be_mapped_of_a_process_that_runs_is_told_by_name(ends):
    ends.publish(2, NOWHERE)
    ends.post(0, 2)
    with pytest.raises(PeerMemoryFailed, match=f"memory of endpoint 2, whose process {os.getpid()} runs: no such"):
        ends.wait(0)


@both_on_device
def test_what_is_posted_to_a_process_that_has_ended_is_over(ends):
    ends.publish(2, NOWHERE, pid=2**22 + 1)
    ends.post(0, 2)
    assert [a.move_id for a in ends.wait(0)] == [(0, 0, 0)]


class FailingSide(NoStream):
    @contextmanager
    def after(self, mark):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
        yield


class Failing(StandIn):
    side = FailingSide()


@pytest.mark.parametrize("ends", [(Failing, StandIn)], indirect=True)
def test_a_write_that_fails_is_told_by_name(ends):
    ends.post(0, 1)
    with pytest.raises(PeerMemoryFailed, match=r"memory of endpoint 1, whose process \d+ runs: CUDA error"):
        ends.wait(0)


@pytest.mark.parametrize("ends", [(NoDevice, StandIn)], indirect=True)
def test_a_peer_on_a_gpu_that_is_not_reached_is_refused_by_name(ends):
    with pytest.raises(ValueError, match="endpoint 1: memory on GPU stand-in: expected KV in host memory.*=gloo"):
        ends.post(0, 1)


def test_a_handle_is_the_same_after_the_store():
    store, handle = HashStore(), DeviceHandle("GPU-1", b"\xff\0\x80", 3, 2**40, b"/torch_1", 9)
    Directory(store, "mapped").publish(0, Endpoint("h", 1, [Memory(2**40, on_device=handle)]))
    assert Directory(store, "mapped").find(0).memories[0].on_device == handle


def test_staged_rows_arrive_as_copied_ones_do():
    """More than one piece, the last of them partly full."""
    rng, row_bytes = np.random.default_rng(1), 1 << 20
    source = torch.from_numpy(rng.integers(0, 256, 80 * row_bytes, dtype=np.uint8))
    rows, to = rng.permutation(80)[:70], rng.permutation(80)[:70]
    direct, staged = torch.zeros_like(source), torch.zeros_like(source)
    copy_rows(source, rows, direct, to, row_bytes)
    copy_staged(source, rows, staged, to, row_bytes)
    assert torch.equal(direct, staged)


@needs_gpu
def test_a_part_of_a_storage_on_a_gpu_is_refused_by_name():
    with pytest.raises(ValueError, match="a part of a storage on cuda:0: expected all 4096 bytes of it"):
        Gpu(0).share(torch.zeros(4096, dtype=torch.uint8, device="cuda:0")[64:])


@needs_gpu
def test_a_gpu_that_this_process_does_not_see_is_refused_by_name():
    with pytest.raises(ValueError, match="memory on GPU elsewhere: expected one that this process sees: .+"):
        Gpu(0).check(DeviceHandle("elsewhere", b"", 0, 1, b"", 0))


@needs_gpu
def test_a_copy_on_the_gpu_follows_the_work_of_the_stream_that_posts_it():
    gpu, memory = Gpu(0), torch.zeros(1 << 28, device="cuda:0")
    for value in range(1, 30):
        memory.fill_(value)
    with gpu.side.after(gpu.side.mark()):
        assert float(memory[-1]) == 29


@needs_gpu
def test_a_receiver_on_the_gpu_that_is_killed_is_survived_or_named():
    """CUDA does not say what becomes of writes to memory of a process that has ended."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    sender, receiver = (Peer(ON_GPU, server.port, number, [1 << 20]).ready() for number in (0, 1))
    moves = [rows_move((0, 0), (1, 0), 1 << 12, range(256), range(256))] * 200
    sender.call("carry", moves)
    sender.call("post", moves)
    receiver.kill()
    sender.call("post", moves)
    try:
        assert len(sender.call("wait", 400)) == 400
        sender.end()
    except PeerMemoryFailed as error:
        assert "memory of endpoint 1, whose process" in str(error)
        sender.kill()
