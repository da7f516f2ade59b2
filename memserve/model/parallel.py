"""Shard: which part of a decoder a rank holds, and how the parts become one answer. Knows no layer and no request.

Tensor parallelism after Megatron-LM (arXiv 1909.08053): the first projection of a block is split by output features
(query and kv heads, the MLP's intermediate features), the second by input features, so that one sum over the ranks ends
each block. The head is split by vocabulary; rank 0, the leader, puts the logits together, samples, and tells the
others. Embedding and norms are whole on every rank.

Shape legend: T tokens, E hidden size, S sampled rows, V vocabulary, P = V / ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from memserve.model.layers import Linear
from memserve.model.model_config import ModelConfig
from memserve.model.sampler import Sampler, SamplingRow
from memserve.request import TokenLogprobs

LEADER = 0
_SPLIT = ("num_kv_heads", "num_heads", "intermediate_size", "vocab_size")


class GroupBroken(RuntimeError):
    """A rank of the group has gone, or did not answer in time; whatever is under way on this one cannot be finished."""


def check_divides(config: ModelConfig, size: int) -> None:
    """Raises ValueError naming a size of the model that cannot be split over `size` ranks, and what could."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"tensor parallelism of {size!r} ranks: expected an integer >= 1")
    for name in _SPLIT:
        value = getattr(config, name)
        if value % size:
            allowed = [n for n in range(1, config.num_kv_heads + 1) if all(getattr(config, f) % n == 0 for f in _SPLIT)]
            raise ValueError(
                f"tensor parallelism of {size} ranks: the model's {name}={value} does not divide by {size}, "
                f"expected one of {', '.join(map(str, allowed))}"
            )


class Shard(ABC):
    """Rank `rank` of `size`. Parts are equal and in order: rank r holds [r * n, (r + 1) * n) of n * size features.

    All ranks make the same calls in the same order.
    """

    rank: int
    size: int

    def config(self, config: ModelConfig) -> ModelConfig:
        """The model as this rank sees it: its heads and intermediate features; all of the rest, and the vocabulary.

        Raises ValueError naming a size that does not divide.
        """
        check_divides(config, self.size)
        return replace(
            config,
            num_heads=config.num_heads // self.size,
            num_kv_heads=config.num_kv_heads // self.size,
            intermediate_size=config.intermediate_size // self.size,
        )

    def part(self, whole: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's part of a tensor along `dim`, a view."""
        length = whole.shape[dim] // self.size
        return whole.narrow(dim, self.rank * length, length)

    def addend(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        """What this rank adds to a product that is summed over the ranks: the bias counts once."""
        return bias if self.rank == LEADER else None

    @abstractmethod
    def sum(self, partial_TE: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' partial_TE, on each of them; the argument's memory may be used for it."""

    @abstractmethod
    def gather(self, part_SP: torch.Tensor) -> torch.Tensor:
        """Leader: all ranks' parts beside each other, [S, V]. Others: their own part, from which nobody samples."""

    @abstractmethod
    def broadcast(self, tensor: torch.Tensor) -> None:
        """Fills `tensor` (contiguous, of one shape and dtype everywhere) with the leader's."""

    @abstractmethod
    def sampler(self, own: Sampler) -> Sampler:
        """What samples on this rank where `own` does on a rank alone."""


class WholeModel(Shard):
    """All of a model on one rank: every operation is the one that does nothing."""

    rank, size = LEADER, 1

    def sum(self, partial_TE: torch.Tensor) -> torch.Tensor:
        return partial_TE

    def gather(self, part_SP: torch.Tensor) -> torch.Tensor:
        return part_SP

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Nobody to tell."""

    def sampler(self, own: Sampler) -> Sampler:
        return own


WHOLE = WholeModel()


class SummedLinear(Linear):
    """Each rank's product of its own input features, summed over the ranks."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, shard: Shard) -> None:
        super().__init__(weight, bias)
        self._shard = shard

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        return self._shard.sum(super().forward(x_TI))


class GroupShard(Shard):
    """A model split over the ranks of a process group, gloo or NCCL.

    An idle instance's followers wait in a broadcast, so the group's timeout bounds how long it may be idle.
    Every operation raises GroupBroken when a rank has gone.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        assert self.rank >= 0, "this process is no member of the group"
        self._group = group

    def sum(self, partial_TE: torch.Tensor) -> torch.Tensor:
        total_TE = partial_TE.contiguous()
        self._collectively(lambda: dist.all_reduce(total_TE, group=self._group))
        return total_TE

    def gather(self, part_SP: torch.Tensor) -> torch.Tensor:
        if not len(part_SP):
            return part_SP
        parts = [torch.empty_like(part_SP) for _ in range(self.size)] if self.rank == LEADER else None
        self._collectively(lambda: dist.gather(part_SP.contiguous(), parts, group=self._group, group_dst=LEADER))
        return part_SP if parts is None else torch.cat(parts, -1)

    def broadcast(self, tensor: torch.Tensor) -> None:
        self._collectively(lambda: dist.broadcast(tensor, group=self._group, group_src=LEADER))

    def sampler(self, own: Sampler) -> Sampler:
        return _LeadingSampler(own, self) if self.rank == LEADER else _FollowingSampler(self)

    def leave(self) -> None:
        """Keeps the group no longer; nothing may be asked of this rank any more."""
        del self._group

    def _collectively(self, operation: Callable[[], object]) -> None:
        try:
            operation()
        except RuntimeError as error:
            raise GroupBroken(f"rank {self.rank} of {self.size} lost its tensor-parallel group: {error}") from error


@contextmanager
def default_group() -> Iterator[Shard]:
    """This rank's share in torch's default group, which ends with it, its threads included, unless an error on its way
    still refers to it. One that lets go of a tensor while the interpreter ends aborts the process.
    """
    assert dist.group.WORLD is not None, "who calls this has made it"
    shard = GroupShard(dist.group.WORLD)
    try:
        yield shard
    finally:
        shard.leave()
        dist.destroy_process_group()


class _LeadingSampler(Sampler):
    """Samples with `own` and tells the followers."""

    def __init__(self, own: Sampler, shard: Shard) -> None:
        self._own, self._shard = own, shard

    def sample(
        self, logits_RV: torch.Tensor, rows: Sequence[SamplingRow]
    ) -> tuple[np.ndarray, list[TokenLogprobs | None] | None]:
        tokens, logprobs = self._own.sample(logits_RV, rows)
        self._shard.broadcast(torch.from_numpy(tokens).to(logits_RV.device))
        return tokens, logprobs


class _FollowingSampler(Sampler):
    """Takes the leader's tokens; its own logits are a part of the vocabulary."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard

    def sample(
        self, logits_RV: torch.Tensor, rows: Sequence[SamplingRow]
    ) -> tuple[np.ndarray, list[TokenLogprobs | None] | None]:
        tokens_R = torch.empty(len(rows), dtype=torch.int32, device=logits_RV.device)
        self._shard.broadcast(tokens_R)
        return tokens_R.cpu().numpy(), None
