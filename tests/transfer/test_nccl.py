"""Nccl is refused by name where it cannot run; what it adds to Gloo needs two GPUs."""

import os

import pytest
import torch
from torch.distributed import HashStore, is_nccl_available

from memserve.transfer import Nccl
from memserve.transfer.directory import Directory, Endpoint, Memory
from memserve.transfer.liveness import started_at

NO_NCCL = "needs a CUDA device and a torch built with NCCL: run it on a machine that has them"


def here(device):
    """Of this process, which runs."""
    return Endpoint("here", os.getpid(), [Memory(64)], device, started_at(os.getpid()))


@pytest.mark.parametrize("device", [-1, 99])
def test_a_device_that_is_not_there_is_refused_by_name(device):
    with pytest.raises(ValueError, match=f"transport=nccl on device {device}: expected one of .* GPUs of a torch with"):
        Nccl(HashStore(), device)


def test_two_endpoints_on_one_device_are_refused_by_name():
    directory = Directory(HashStore(), "nccl")
    directory.publish(0, here("GPU 7"))
    directory.publish(1, here("GPU 8"))
    with pytest.raises(ValueError, match="endpoint 2 uses GPU 7, as another does: expected a device of its own"):
        directory.publish(2, here("GPU 7"))
    directory.give_back_device(0)
    directory.publish(3, here("GPU 7"))


def test_the_device_of_a_process_that_has_ended_is_free_again():
    directory = Directory(HashStore(), "nccl")
    directory.publish(0, Endpoint("here", 2**22 + 1, [Memory(64)], "GPU 7"))
    directory.publish(1, here("GPU 7"))


@pytest.mark.skipif(not (torch.cuda.is_available() and is_nccl_available()), reason=NO_NCCL)
def test_two_transports_of_one_gpu_are_refused_by_name():
    """The same by the transport itself, where there is a GPU."""
    store, memory = HashStore(), torch.zeros(64, dtype=torch.uint8, device="cuda")
    first = Nccl(store, 0)
    first.attach(0, [memory])
    with pytest.raises(ValueError, match="endpoint 1 uses GPU .*, as another does"):
        Nccl(store, 0).attach(1, [memory])
    first.close()
    again = Nccl(store, 0)
    again.attach(2, [memory])
    again.close()
