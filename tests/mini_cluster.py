"""One instance played by hand: submit prompts, step until they are answered. What tests use instead of a cluster."""

import functools
from dataclasses import dataclass, field

import numpy as np

from memserve.hash_runner import HashRunner, hash_geometry
from memserve.instance import Instance
from memserve.kvcache import LRU, AtOnce, DiscreteLayout, MemPool, NullIndex, RadixIndex
from memserve.messages import Dispatch, Finished, Tokens, pack_tokens, unpack_tokens
from memserve.request import Role
from memserve.sampling_params import SamplingParams
from memserve.sched.admission import Limits
from memserve.sched.batching import Mixed
from memserve.sched.group import Group
from memserve.sched.local_scheduler import LocalScheduler
from memserve.sched.preemption import Recompute
from memserve.sched.prompt_tree import NoPromptTree, PromptIndex
from memserve.sched.queue_policy import FCFS
from memserve.sched.routing import ClusterSnapshot, Policy
from memserve.sched.swap_policy import Always

VOCAB = 1000


@dataclass
class Options:
    index: str = "radix"
    block_size: int = 4
    num_blocks: int = 1000
    chunk_size: int | None = None
    token_budget: int = 512
    max_running: int = 64
    layout: object = field(default_factory=DiscreteLayout)
    queue: object = field(default_factory=FCFS)
    max_context: int = 4000
    num_dram_blocks: int = 0
    preemption: object = field(default_factory=Recompute)
    swap: object = field(default_factory=Always)
    eviction: object = field(default_factory=LRU)
    engine: object = AtOnce
    swap_ahead_blocks: int = 0
    lookahead: int = 0
    batching: object = field(default_factory=Mixed)


def hash_instance(options: Options | None = None, **changes) -> Instance:
    """An instance that runs HashRunner over a pool of its own."""
    o = options or Options(**changes)
    index = functools.partial(RadixIndex, eviction=o.eviction) if o.index == "radix" else NullIndex
    geometry, tiers = hash_geometry(o.block_size), {"num_dram_blocks": o.num_dram_blocks, "engine": o.engine}
    pool = MemPool(geometry, o.layout, o.num_blocks, index, **tiers)
    scheduler = LocalScheduler(
        pool.blocks,
        o.queue,
        o.preemption,
        o.swap,
        token_budget=o.token_budget,
        chunk_size=o.chunk_size,
        max_running=o.max_running,
        swap_ahead_blocks=o.swap_ahead_blocks,
        lookahead=o.lookahead,
        batching=o.batching,
    )
    limits = Limits(o.max_context, VOCAB, o.num_blocks, o.block_size)
    return Instance("colocated-0", Role.COLOCATED, scheduler, HashRunner(pool.kv, VOCAB), limits)


def group_of(labels: list[str], policy: Policy, tree: PromptIndex | None = None, costs=None) -> Group:
    """A group of the global scheduler; without a tree it believes nothing of the instances' caches."""
    return Group(labels, range(len(labels)), policy, tree or NoPromptTree(len(labels), 4), costs)


def dispatch(instance: Instance, name: str, prompt, params: SamplingParams, now_ns: int = 0, priority: int = 0) -> None:
    instance.receive(Dispatch(name, 0, "", pack_tokens(np.asarray(prompt)), params, now_ns, priority=priority))


def sizes(instance: Instance) -> list[tuple[str, int]]:
    """(requests, tokens) of the next step, computed and committed."""
    batch = instance.schedule(0)
    instance.commit(batch, instance.forward(batch), np.array([0]))
    return [(r.request_id, n) for r, n in zip(batch.requests, batch.num_new, strict=True)]


def serve(instance: Instance, prompts: dict, max_tokens: int, check: bool = True) -> dict[str, list[int]]:
    """Answers of all prompts, served together; `check()` after each step."""
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    for name, prompt in prompts.items():
        dispatch(instance, name, prompt, params)
    answers, finished = collect(instance, check)
    assert set(finished) == set(prompts)
    return {name: answers[name] for name in prompts}


def collect(instance: Instance, check: bool = True) -> tuple[dict[str, list[int]], dict[str, Finished]]:
    """Steps until nothing is left to do; what every request generated, and how it ended."""
    answers: dict[str, list[int]] = {}
    finished: dict[str, Finished] = {}
    now_ns, stuck = 0, 0
    while instance.num_unfinished or instance.has_inbox:
        now_ns += 1
        batch = instance.schedule(now_ns)
        if batch is not None:
            instance.commit(batch, instance.forward(batch), np.array([now_ns]))
        is_waiting = instance.num_unfinished and not instance.pool.num_swapping
        stuck = stuck + 1 if batch is None and is_waiting else 0
        assert stuck < 3, "the instance makes no progress"
        if check:
            instance.check()
        for message in instance.drain_outbox():
            if isinstance(message, Tokens):
                answer = answers.setdefault(message.request_id, [])
                assert message.index == len(answer)
                answer.extend(unpack_tokens(message.token_ids).tolist())
            else:
                finished[message.request_id] = message
    return answers, finished


def hash_answer(prompt, num_tokens: int) -> list[int]:
    """What HashRunner must answer, written out in plain Python integers from its definition."""
    mask, answer, tokens = (1 << 64) - 1, [], [int(t) for t in prompt]
    chain, weight, layer_step = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95, 0x2545F4914F6CDD1D
    for _ in range(num_tokens):
        h, total = 0, 0
        for i, token in enumerate(tokens):
            h = (h * chain + token + 1) & mask
            for layer_half in range(4):
                total += h * pow(weight, i, 1 << 64) * (layer_half * layer_step + 1)
        word = total & mask
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & mask
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB & mask
        tokens.append((word ^ (word >> 31)) % VOCAB)
        answer.append(tokens[-1])
    return answer


def snapshot(requests, tokens=None, num_routed=0, **columns):
    """What a policy is shown of colocated instances with so many requests each, and else nothing."""
    labels = tuple(f"colocated-{i}" for i in range(len(requests)))
    none = np.zeros(len(requests), dtype=np.int64)
    names = (
        "num_cached",
        "queued_work",
        "num_lately",
        "num_decoding",
        "num_gpus",
        "free_blocks",
        "num_blocks",
        "said_s",
    )
    columns = {**dict.fromkeys(names, none), "home": None, "now_s": 0.0, **columns}
    return ClusterSnapshot(labels, np.array(requests), np.array(tokens or requests), num_routed, **columns)
