"""Worker: how the ranks of a tensor-parallel instance act as one. Knows batches and block numbers; decides nothing.

The leader alone has a scheduler, an index and a mode. Before it computes a batch or moves blocks between the media, it
tells the followers, and each does the same to its part of the model and of every block:

    leader                                       followers, inside `follow`
    ParallelRunner.forward(batch)  --Compute-->        runner.forward_by_layer(batch)
    ParallelCopier.copy(from, to)  --CopyBlocks-->     copier.copy(from, to), and all wait for each other
    ParallelTransport.detach(...)  --Detach-->         hand.detach(endpoint), and all wait for each other
    Followers.stop()               --StopFollowing-->  return

A block has one number on all ranks, so their pools are equal in size. Messages go over the group that the model's sums
go over, one after another: what was told first is done first. A block may go to another user once the leader returns:
no rank has read or written it later, since a batch ends with a sum over the ranks too. Arrays travel as little-endian
int32 bytes. What followers do for transfers is said in parallel_transport.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import msgspec
import numpy as np
import torch

from memserve.kvcache.copy_engine import BlockCopier
from memserve.messages import pack_tokens, unpack_tokens
from memserve.model.parallel import LEADER, GroupBroken, Shard
from memserve.model.runner import ModelRunner
from memserve.request import LayerRun, Request, ScheduledBatch, StepOutput
from memserve.sampling_params import SamplingParams

_FRAME_BYTES = 16 * 1024  # what a message's first broadcast carries; only longer ones take a second
_LENGTH_BYTES = 8
_NOT_SAMPLED_HERE = SamplingParams()  # of requests whose tokens the leader chooses


class Compute(msgspec.Struct, frozen=True, tag=True):
    """A batch of R requests. num_new, num_computed, num_tokens, num_blocks: [R], as in ScheduledBatch and Request.

    token_ids, blocks: request after request, its num_new tokens and the num_blocks numbers of its block table.
    """

    num_new: bytes
    num_computed: bytes
    num_tokens: bytes
    num_blocks: bytes
    token_ids: bytes
    blocks: bytes
    num_steps: int


class CopyBlocks(msgspec.Struct, frozen=True, tag=True):
    """Copy the contents of blocks `source` to `target`, each [n]."""

    source: bytes
    target: bytes


class Detach(msgspec.Struct, frozen=True, tag=True):
    """Forget an endpoint of the transport: its process is gone."""

    endpoint: int


class StopFollowing(msgspec.Struct, frozen=True, tag=True):
    """reason: why the leader leaves early; "" at a run's end."""

    reason: str = ""


WorkerMessage = Compute | CopyBlocks | Detach | StopFollowing
_encoder, _decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(WorkerMessage)


class Followers:
    """The other ranks, as the leader sees them: they do what they are told, and then are in step again.

    shard: the leader's.  device: where the group moves tensors from; the model's.  num_layers: layers whose KV the
    leader has written, in all batches.
    """

    def __init__(self, shard: Shard, device: torch.device) -> None:
        assert shard.rank == LEADER, f"rank {shard.rank} follows"
        self._shard, self._device = shard, device
        self._lost = ""  # why they can be told nothing more
        self.num_layers = 0

    @property
    def num_ranks(self) -> int:
        """The leader and all of them."""
        return self._shard.size

    @contextmanager
    def told(self, message: WorkerMessage) -> Iterator[None]:
        """While the leader does its own part of `message`. If that fails half-way the group is of no use any more.

        Raises GroupBroken if that has happened before, if they were stopped, or if one has gone.
        """
        if self._lost:
            raise GroupBroken(self._lost)
        self._lost = f"the leader left {type(message).__name__} half-way: its followers wait in the middle of it"
        _tell(self._shard, self._device, message)
        yield
        self._lost = ""

    def meet(self) -> None:
        """Waits until every rank is here. Raises GroupBroken when one has gone."""
        meet(self._shard, self._device)

    def stop(self, reason: str = "") -> None:
        """Lets `follow` return `reason` on every follower. Raises GroupBroken as `told` does."""
        with self.told(StopFollowing(reason)):
            pass
        self._lost = "the followers were stopped"


class ParallelRunner:
    """The leader's runner: a whole instance's compute to whoever calls it."""

    def __init__(self, runner: ModelRunner, followers: Followers) -> None:
        self._runner, self._followers = runner, followers

    @property
    def block_size(self) -> int:
        return self._runner.block_size

    @property
    def num_near_ties(self) -> int | None:
        """The leader's, who samples for all."""
        return self._runner.num_near_ties

    def forward(self, batch: ScheduledBatch) -> StepOutput:
        """As ModelRunner's. Raises GroupBroken when a follower has gone."""
        return LayerRun(self.forward_by_layer(batch)).finish()

    def forward_by_layer(self, batch: ScheduledBatch) -> Generator[int, None, StepOutput]:
        """As ModelRunner's, for the layers of this rank; it has to be run to its end. Raises GroupBroken as above."""
        with self._followers.told(_compute(batch, self.block_size)):
            layers = LayerRun(self._runner.forward_by_layer(batch))
            for layer in layers:
                self._followers.num_layers += 1
                yield layer
            return layers.output


class ParallelCopier(BlockCopier):
    """The leader's copier: moves each block's part on every rank. copier: of the leader's own part."""

    def __init__(self, copier: BlockCopier, followers: Followers) -> None:
        self._copier, self._followers = copier, followers
        self.device = copier.device

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copies blocks `source` to `target`, int32 [n]. Raises GroupBroken when a follower has gone."""
        if len(source):
            with self._followers.told(CopyBlocks(pack_tokens(source), pack_tokens(target))):
                self._copier.copy(source, target)
                self._followers.meet()


class Hand(ABC):
    """What a follower does for the transfers of its instance."""

    @abstractmethod
    def layer_written(self) -> None:
        """One more layer of a batch has its KV."""

    @abstractmethod
    def detach(self, endpoint: int) -> None:
        """As Transport.detach."""


class IdleHand(Hand):
    """Of an instance without transfers."""

    def layer_written(self) -> None:
        """Nobody waits for it."""

    def detach(self, endpoint: int) -> None:
        """Nothing is attached."""


def meet(shard: Shard, device: torch.device) -> None:
    """Returns once every rank of the group has called it. Raises GroupBroken when one has gone."""
    shard.sum(torch.zeros((1, 1), device=device)).cpu()


def follow(runner: ModelRunner, copier: BlockCopier, hand: Hand) -> str:
    """Does what the leader says until it says stop; returns why, "" at a run's end. A follower's life.

    runner, copier, hand: of this rank's part. Raises GroupBroken when another rank has gone.
    """
    model = runner.model
    assert model.shard.rank != LEADER, "the leader follows nobody"
    while True:
        match _hear(model.shard, model.device):
            case Compute() as message:
                for _ in LayerRun(runner.forward_by_layer(_batch(message))):
                    hand.layer_written()
            case CopyBlocks(source, target):
                copier.copy(unpack_tokens(source), unpack_tokens(target))
                meet(model.shard, model.device)
            case Detach(endpoint):
                hand.detach(endpoint)
                meet(model.shard, model.device)
            case StopFollowing(reason):
                return reason


def _compute(batch: ScheduledBatch, block_size: int) -> Compute:
    """What a runner reads of a batch: the tokens to compute, and the blocks they reach."""
    requests = batch.requests
    num_new = np.array(batch.num_new, dtype=np.int32)
    num_computed = np.array([r.num_computed for r in requests], dtype=np.int32)
    ends = num_computed + num_new
    num_blocks = -(-(ends + batch.num_steps - 1) // block_size)
    tokens = [r.tokens.view[c:n] for r, c, n in zip(requests, num_computed, ends, strict=True)]
    blocks = [r.block_table.view[:n] for r, n in zip(requests, num_blocks, strict=True)]
    return Compute(
        num_new=pack_tokens(num_new),
        num_computed=pack_tokens(num_computed),
        num_tokens=pack_tokens(np.array([r.num_tokens for r in requests])),
        num_blocks=pack_tokens(num_blocks),
        token_ids=pack_tokens(np.concatenate(tokens)),
        blocks=pack_tokens(np.concatenate(blocks)),
        num_steps=batch.num_steps,
    )


def _batch(message: Compute) -> ScheduledBatch:
    """The leader's batch, with requests that know what is computed now and of the rest its length alone."""
    counts = [unpack_tokens(getattr(message, name)) for name in ("num_new", "num_computed", "num_tokens", "num_blocks")]
    num_new, num_computed, num_tokens, num_blocks = counts
    tokens = np.split(unpack_tokens(message.token_ids), np.cumsum(num_new)[:-1])
    blocks = np.split(unpack_tokens(message.blocks), np.cumsum(num_blocks)[:-1])
    requests = []
    for i, (start, length) in enumerate(zip(num_computed.tolist(), num_tokens.tolist(), strict=True)):
        prompt = np.zeros(length, dtype=np.int32)
        prompt[start : start + len(tokens[i])] = tokens[i]
        request = Request(str(i), prompt, _NOT_SAMPLED_HERE)
        request.num_computed = start
        request.block_table.extend(blocks[i])
        requests.append(request)
    return ScheduledBatch(requests, num_new.tolist(), message.num_steps)


def _tell(shard: Shard, device: torch.device, message: WorkerMessage) -> None:
    data = np.frombuffer(_encoder.encode(message), dtype=np.uint8)
    frame = np.zeros(_FRAME_BYTES, dtype=np.uint8)
    frame[:_LENGTH_BYTES] = np.frombuffer(len(data).to_bytes(_LENGTH_BYTES, "little"), dtype=np.uint8)
    head, rest = np.split(data, [_FRAME_BYTES - _LENGTH_BYTES])
    frame[_LENGTH_BYTES : _LENGTH_BYTES + len(head)] = head
    shard.broadcast(torch.from_numpy(frame).to(device))
    if len(rest):
        shard.broadcast(torch.from_numpy(rest.copy()).to(device))


def _hear(shard: Shard, device: torch.device) -> WorkerMessage:
    frame = _received(shard, device, _FRAME_BYTES)
    length = int.from_bytes(frame[:_LENGTH_BYTES], "little")
    data = frame[_LENGTH_BYTES : _LENGTH_BYTES + length]
    missing = length - len(data)
    message: WorkerMessage = _decoder.decode(data + _received(shard, device, missing) if missing else data)
    return message


def _received(shard: Shard, device: torch.device, num_bytes: int) -> bytes:
    buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    shard.broadcast(buffer)
    return buffer.cpu().numpy().tobytes()
