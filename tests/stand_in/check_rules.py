"""What the stand-in notices; run by tests/model/test_on_stand_in.py. A rule that nobody can break shows nothing."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from memserve.model.kernels.swiglu import swiglu_launch
from memserve.transfer.block_copy import to_device
from stand_in.plugin import gpu

DEVICE = torch.device("cuda", 0)


def on_gpu(*values: float) -> torch.Tensor:
    return to_device(np.array(values, np.float32), DEVICE)


def test_tensors_of_two_devices_meet_in_no_operation() -> None:
    with pytest.raises(RuntimeError, match="same device, but found cuda:0 and cpu"):
        on_gpu(1, 2) + torch.ones(2)
    assert (on_gpu(1, 2) + torch.tensor(1.0)).tolist() == [2, 3], "a scalar may"


def test_a_kernel_reads_no_memory_of_the_host() -> None:
    with pytest.raises(RuntimeError, match=r"kernel arguments \['out_ptr'\]"):
        swiglu_launch(on_gpu(1, 2, 3, 4).view(1, 4), torch.empty(1, 2)).run()


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.cpu(), lambda x: x.tolist(), lambda x: float(x[0]), lambda x: x.nonzero(), lambda x: x[x > 1],
        lambda x: x[[0, 1]], lambda x: x[torch.tensor([1])], lambda x: x.new_tensor([1.0]), lambda x: x.to("cpu"),
        lambda x: torch.zeros(2).to(DEVICE), lambda x: torch.zeros(2).to(DEVICE, non_blocking=True),
        lambda x: x.copy_(torch.zeros(2)), lambda x: torch.zeros(2).copy_(x), lambda x: x.__setitem__([0], 1.0),
        lambda x: torch.tensor([1.0], device=DEVICE), lambda x: bool(x.sum() > 1),
        lambda x: torch.cuda.current_stream().synchronize(),
    ],
)  # fmt: skip
def test_whoever_waits_is_counted(wait) -> None:
    x, before = on_gpu(1, 2), gpu.num_waits
    wait(x)
    assert gpu.num_waits > before


def test_what_needs_no_waiting_is_not_counted() -> None:
    before = gpu.num_waits
    x = on_gpu(1, 2)
    x[on_gpu(0).long()] += 1
    x[:1] = 3
    torch.where(x > 1, x, x * 2).argmax(-1)
    x.copy_(torch.zeros(2).pin_memory(), non_blocking=True)
    assert gpu.num_waits == before


def test_host_memory_that_changes_under_an_asynchronous_copy_is_noticed() -> None:
    host = torch.ones(2).pin_memory()
    host.to(DEVICE, non_blocking=True)
    host[0] = 2
    with pytest.raises(RuntimeError, match="changed while it was copied"):
        torch.cuda.current_stream().synchronize()


def test_memory_that_nobody_has_written_is_no_number() -> None:
    assert torch.empty(3, device=DEVICE).isnan().all() and on_gpu(1).new_empty(2).isnan().all()
    assert (torch.zeros(3, device=DEVICE) == 0).all()


def test_a_graph_computes_again_from_what_its_inputs_hold_then() -> None:
    x, table = on_gpu(1, -2), on_gpu(5, 6)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        picked = table[x.abs().long() - 1]
        total = torch.empty_like(x)
        total[:] = picked * 10
        total += x
    assert total.tolist() == [51, 58]
    x.copy_(on_gpu(2, 1))
    table.copy_(on_gpu(7, 8))
    graph.replay()
    assert total.tolist() == [82, 71]


@pytest.mark.parametrize(
    "step", [lambda x: x.sum().item(), lambda x: x + on_gpu(1, 2), lambda x: torch.cuda.synchronize()]
)
def test_while_a_graph_is_captured_nobody_waits_or_copies_from_the_host(step) -> None:
    x = on_gpu(1, 2)
    with pytest.raises(RuntimeError, match="capturing|captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        step(x)


def test_a_thread_beside_the_one_that_computes_copies_on_a_stream_of_its_own() -> None:
    x, side = on_gpu(1, 2), torch.cuda.Stream(DEVICE)

    def copied_in_a_thread(stream: torch.cuda.Stream | None) -> torch.Tensor:
        def copy() -> torch.Tensor:
            with torch.cuda.stream(stream):
                return x.clone()

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(copy).result()

    assert copied_in_a_thread(side).tolist() == [1, 2]
    with pytest.raises(RuntimeError, match="on the stream of what computes"):
        copied_in_a_thread(None)
