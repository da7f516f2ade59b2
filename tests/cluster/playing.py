"""Simulated clusters played to their end: what befalls them meanwhile, and what is held against what."""

import numpy as np

from memserve.request import SERVING
from memserve.sched.scaling import Add, ChangeRole, Crash, Drain

SLOW_LINK = [  # so that much happens while KV is on its way
    "transfer.retry_s=0.05", "transfer.deadline_s=0.5", "transfer.patience_s=5", "link.gb_per_s=0.001",
    "workload.think_time_s=0.05",
]  # fmt: skip
CLUSTERS = {
    "basic": ["cluster=1p2d", "mode=pd_basic"],
    "caching 1": ["cluster=2p1d", "mode=pd_caching_1"],
    "caching 2": ["cluster.roles=[prefill,prefill,decode,decode]", "mode=pd_caching_2", "fetch=always"],
    "caching 3": ["cluster.roles=[prefill,prefill,decode,decode]", "mode=pd_caching_3", "policy=prompt_tree_bounded"],
    "colocated": ["cluster=colocated_2", "policy=prompt_tree_bounded", "fetch=always"],
}


def play(cluster, act=lambda cluster, number: None, *, check=False):
    """The timelines when nothing is left to do; `act` is called after each event with its number.

    check: all books, too, after every third: what is wrong in them stays wrong.
    """
    number = 0
    while cluster.advance():
        number += 1
        act(cluster, number)
        for node in cluster.nodes if check and number % 3 == 0 else ():
            if not node.is_gone:
                node.instance.check()
    return list(cluster.scheduler.timelines.values())


def tokens_of(timelines):
    """What each request was answered."""
    return {timeline.request_id: timeline.token_ids.tolist() for timeline in timelines}


def rows_of(timelines):
    """What each request was answered where and when, to the nanosecond, and all that was counted of it."""
    return [(t.request_id, t.instance, t.finished_ns, t.token_times_ns.tolist(), t.stats) for t in timelines]


def nothing_is_left(cluster):
    for node in cluster.nodes:
        if not node.is_gone:
            node.instance.check()
            assert node.instance.is_idle
            assert [h for h in node.instance.pool.allocator.holders() if h != ("index",)] == []
    for group in cluster.scheduler.groups.all:
        assert all(group.num_requests(label) == 0 for label in group.labels)
        group.tree.check()


def drawn(cluster, rng):
    """A change that the cluster can do now, if chance finds one."""
    waiting = cluster.members._held  # are to drain already, once somebody else of their role serves
    here = [m for m in cluster.members.members if m.standing == "serving" and m.role in SERVING and m not in waiting]
    roles = sorted({m.role for m in cluster.members.members}.intersection(SERVING))
    if not here:
        return None
    one = here[int(rng.integers(len(here)))]
    is_needed = sum(m.role == one.role for m in here) < 2
    kind = int(rng.integers(4))
    if kind == 0 or is_needed:
        return Add(roles[int(rng.integers(len(roles)))]) if len(here) < 7 else None
    if kind == 1:
        return Drain(one.label)
    if kind == 2 and len(roles) > 1:
        return ChangeRole(one.label, roles[int(rng.integers(len(roles)))])
    return None


def at_random(seed, often, *, crash=0.0, changes=None):
    """What befalls a cluster after each event: a change with one probability, a crash with another. changes: kept."""
    rng, made = np.random.default_rng(seed), [] if changes is None else changes

    def act(cluster, number):
        if rng.random() < often and (change := drawn(cluster, rng)) is not None:
            cluster.change(change)
            made.append(change)
        there = [m for m in cluster.members.members if m.standing is not None]
        if crash and there:
            one = there[int(rng.integers(len(there)))]
            is_last = one.standing == "serving" and sum(m.role == one.role for m in there) < 2
            if rng.random() < crash and not is_last:
                cluster.change(Crash(one.label))

    return act


def scheduled(*changes, words=(), **delays):
    """The words of a schedule of changes, after `startup_s` and such delays."""
    listed = ",".join("{" + ",".join(f"{key}:{value}" for key, value in change.items()) + "}" for change in changes)
    delayed = [f"scaling.{key}={value}" for key, value in delays.items()]
    return ["scaling=schedule", f"scaling.changes=[{listed}]", *delayed, *words]
