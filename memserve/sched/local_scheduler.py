"""LocalScheduler: picks this step's tokens. Knows blocks by number only; never sees a tensor.

A request's life here (states of request.Phase):

    add -> WAITING -> admitted: cached prefix retained, blocks for its tokens allocated -> RUNNING in `running`
        -> chunks until num_computed catches up with num_tokens, then a token a step -> finish -> FINISHED
    WAITING -> SWAPPING_IN while what is cached comes up from DRAM, where that is copied beside compute -> WAITING
    RUNNING -> preempted when a decode step finds no block -> WAITING, ahead of new ones; any -> abort -> FINISHED

There is no prefill phase or decode phase: each step, running requests get as many of their tokens computed as the token
budget allows, all of them or those whose turn it is (batching.py). Blocks enter the index only in `commit`, after the
forward that wrote them.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

from memserve.kvcache.block_pool import BlockPool
from memserve.kvcache.errors import OutOfBlocks
from memserve.request import FinishReason, Phase, Request, ScheduledBatch, StepOutput
from memserve.sched.admission import cached_prefix, keep_cached, usable_prefix
from memserve.sched.batching import Batching, Mixed, turn
from memserve.sched.check_books import check_books
from memserve.sched.counts import SchedulerCounts
from memserve.sched.macro_steps import growth, most_steps, steps_before_eviction
from memserve.sched.preemption import Preemption, Recompute, preempt
from memserve.sched.publisher import Publisher
from memserve.sched.queue_policy import QueuePolicy, victim_of
from memserve.sched.swap_policy import SwapPolicy
from memserve.sched.waiting_room import WaitingRoom


class LocalScheduler:
    """Continuous batching with chunked prefill over one instance's pool. batching: who shares a step; Mixed by default.

    token_budget: most tokens computed in a step.  chunk_size: most prompt tokens of one request in a step, or None.
    max_running: most requests admitted at once.  publishes: what is computed here enters the index.
    swap_ahead_blocks: what is cached goes to DRAM while less of HBM is free.  lookahead: for so many `keep_cached`.
    """

    def __init__(
        self,
        pool: BlockPool,
        queue: QueuePolicy,
        preemption: Preemption,
        swap: SwapPolicy,
        *,
        token_budget: int,
        chunk_size: int | None,
        max_running: int,
        swap_ahead_blocks: int = 0,
        lookahead: int = 0,
        publishes: bool = True,
        batching: Batching | None = None,
    ) -> None:
        self.pool = pool
        self.room = WaitingRoom(queue)
        self.running: list[Request] = []
        self.counts = SchedulerCounts()
        self._preemption, self._swap, self._batching = preemption, swap, batching or Mixed()
        self._token_budget, self._chunk_size = token_budget, chunk_size or token_budget
        self._max_running, self._swap_ahead_blocks, self._lookahead = max_running, swap_ahead_blocks, lookahead
        self._publisher = Publisher(pool, publishes)
        self._num_waited = 0  # blocks that were swapped up to the last batch
        self._budget = 0  # tokens that the step being scheduled may still have
        self._made_room = False  # somebody was preempted since waiting requests were last asked
        self._num_owed = 0  # blocks that those who ran then need for tokens that they have: who is admitted has them

    @property
    def num_unfinished(self) -> int:
        return len(self.room) + len(self.running)

    def add(self, request: Request) -> None:
        request.phase = Phase.WAITING
        self.room.waiting.append(request)

    def schedule(self) -> ScheduledBatch | None:
        """This step's batch, blocks included, or None when there is nothing to do. It pays for swaps since the last."""
        batch, self._budget = ScheduledBatch([], []), self._token_budget
        self._publisher.follow(self.room.holders())
        while self._fill(batch):
            pass
        self._publisher.follow(self.room.holders())
        self.pool.swap_ahead(self._swap_ahead_blocks)
        self._batching.check(self.running, batch)
        if not batch.requests:
            return None
        before, self._num_waited = self._num_waited, self.pool.num_waited
        return replace(batch, num_swapped_blocks=self._num_waited - before)

    def commit(self, batch: ScheduledBatch, output: StepOutput) -> None:
        """Enters what the forward computed: borders move, new tokens are appended, full prompt blocks are indexed."""
        self.counts.steps += batch.num_steps
        for request, num_new, samples, row in zip(
            batch.requests, batch.num_new, batch.samples, output.token_ids, strict=True
        ):
            is_prefill = request.num_computed < request.prefill_end
            request.num_computed += num_new + batch.num_steps - 1
            if is_prefill:
                self.counts.computed += num_new
                request.num_prefilled += num_new
                self._publisher.publish(request)
            if samples:
                request.tokens.extend(row)
                self.counts.generated += len(row)
        self._publisher.follow(self.room.holders())

    def adopt(self, request: Request) -> None:
        """Takes a request whose KV is in its block table already; it runs once there is room for one token more."""
        request.phase = Phase.WAITING
        self.room.put_last(request)

    def stop(self, request: Request) -> None:
        """Stops a request that runs, or waits to with all of its KV; its computed full blocks enter the index, and it
        keeps all until it is finished.
        """
        self._publisher.publish(request)
        if request.phase is Phase.RUNNING:
            self.running.remove(request)
        else:
            self.room.remove(request)
        request.phase = Phase.HANDING_OFF

    def resume(self, request: Request) -> None:
        """Goes on with a request that was stopped, before all of its level that wait."""
        request.phase = Phase.WAITING
        self.room.put_first(request)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Ends a request wherever it is; its computed full blocks enter the index and its holds are given up."""
        if request.phase is Phase.RUNNING:
            self.stop(request)
        elif request.phase not in (Phase.HANDING_OFF, Phase.FETCHING):
            self.room.remove(request)
        self.pool.release_all(request.holder)
        request.phase, request.finish_reason = Phase.FINISHED, reason

    def max_macro_steps(self, batch: ScheduledBatch) -> int:
        """How often `batch` can be repeated before anything could change; see `most_steps`."""
        return 1 if self._made_room else most_steps(batch, self.running, self.pool, self._swap_ahead_blocks)

    def steps_before_eviction(self, batch: ScheduledBatch) -> int:
        """How many steps of `batch` are over before one evicts, which a follower is to be told when it does."""
        return steps_before_eviction(batch, self.pool) if self.pool.is_followed else batch.num_steps

    def extend(self, batch: ScheduledBatch) -> None:
        """Allocates the blocks of a batch's repeated steps (`max_macro_steps` promised them), as each in turn would."""
        growing = growth(batch, self.pool.block_size)
        for place, request in enumerate(growing):
            if not self.pool.allocator.num_free:  # room for all that are left, at once
                self.pool.make_room(len(growing) - place, request.holder)
            request.block_table.extend(self.pool.alloc(1, request.holder))

    def check(self, handing_off: Collection[Request] = ()) -> None:
        """Raises unless tables, holders and borders agree; handing_off: what `stop` let go. For tests, fuzzing."""
        check_books(self.pool, self.running, [*self.room.holders(), *handing_off])

    def _fill(self, batch: ScheduledBatch) -> bool:
        """Puts those into the batch whose turn it is; True if who had it found no room, and others have it now."""
        num_preemptions = self.counts.preemptions
        self._serve(batch, self._first(self.running))
        self._admit_waiting(batch)
        if not batch.requests:
            others = self._batching.otherwise(self.running)
            self._serve(batch, turn(self._batching, "otherwise", others))
        return not batch.requests and self.counts.preemptions > num_preemptions

    def _admit_waiting(self, batch: ScheduledBatch) -> None:
        """Admits whom the pool has room for, and serves those whose turn it is."""
        self._made_room = False
        self.room.unpark()
        self._num_owed = sum(self._num_missing(r, r.num_tokens) for r in self.running) if len(self.room) else 0
        while self._budget > 0 and (head := self._next()) is not None:
            candidates = self.room.from_head(head, self.pool.num_blocks)
            if (admitted := next(filter(self._admit, candidates), None)) is not None:
                self._serve(batch, self._first([admitted]))
            elif self.running or not (self.room.unpark() or self._drop_swapped()):
                break

    def _first(self, running: Sequence[Request]) -> list[Request]:
        return turn(self._batching, "first", self._batching.first(running))

    def _serve(self, batch: ScheduledBatch, requests: Sequence[Request]) -> None:
        """Puts the next tokens of those that run into the batch, as far as the budget goes."""
        for request in requests:
            if self._budget and request.phase is Phase.RUNNING and self._grow(request, batch):
                num_new = min(request.num_to_compute, self._chunk_size, self._budget)
                batch.requests.append(request)
                batch.num_new.append(num_new)
                self._budget -= num_new

    def _grow(self, request: Request, batch: ScheduledBatch) -> bool:
        """Makes room for the request's tokens, preempting who comes last until there is; False if that was itself."""
        while True:
            try:
                self._cover(request, request.num_tokens)
                return True
            except OutOfBlocks:
                victim = victim_of(self.room.queue, self.running)
                self._preempt(victim, batch)
                if victim is request:
                    return False

    def _cover(self, request: Request, num_tokens: int) -> None:
        if num_missing := self._num_missing(request, num_tokens):
            request.block_table.extend(self.pool.alloc(num_missing, request.holder))

    def _num_missing(self, request: Request, num_tokens: int) -> int:
        return max(self.pool.blocks_for(num_tokens) - len(request.block_table), 0)

    def _preempt(self, victim: Request, batch: ScheduledBatch) -> None:
        """Takes a request's place, and what it was given in this step."""
        self.running.remove(victim)
        if victim in batch.requests:
            row = batch.requests.index(victim)
            del batch.requests[row]
            self._budget += batch.num_new.pop(row)
        self._publisher.publish(victim)
        preempt(self._preemption, victim, self.pool)
        victim.phase = Phase.WAITING
        self._made_room = True
        self.counts.preempted(victim)
        self.room.put_first(victim)

    def num_cached(self, request: Request) -> int:
        """Tokens of a request that would come from the cache now."""
        return self.pool.index.peek(request.tokens.view, usable_prefix(request.num_tokens)).num_tokens

    def _next(self) -> Request | None:
        is_full = len(self.running) + self.room.num_swapping >= self._max_running
        return None if is_full else self.room.next(self.num_cached)

    def _admit(self, request: Request) -> bool:
        """Gives the request its blocks and runs it, or parks it until a copy has ended; False: the pool lacks them."""
        return self._go_on(request) if len(request.block_table) else self._start_with_prefix(request)

    def _start_with_prefix(self, request: Request) -> bool:
        """Retains the cached prefix and swaps it in, as far as the policy says; the rest is computed."""
        found = cached_prefix(self.pool, request.tokens.view)
        cached = self._swap.used(found.blocks, self.pool.num_blocks, request.num_tokens)
        if (swap := self.pool.swap_in_of(cached)) is not None:
            self.room.park(request, swap, is_own=False)
            return True
        self.pool.allocator.retain(cached, request.holder)  # in the pool's peak once the rest is, too
        request.block_table.extend(cached)
        if not self._bring_up(request):
            request.block_table.truncate(0)
            self.pool.release_all(request.holder)
            return False
        num_cached = request.num_computed = request.num_published = len(cached) * self.pool.block_size
        request.prefill_end = request.num_tokens
        if request.num_preemptions:  # used before: it keeps its place
            self.pool.index.insert(request.tokens.view[:num_cached], cached)
            return True
        self.pool.match(request.tokens.view, num_cached)  # used now: who waits asks in every step, and uses nothing
        request.num_cached = num_cached
        self.counts.cached += num_cached
        return True

    def _go_on(self, request: Request) -> bool:
        """The request has KV: what it was preempted with, its cached prefix, or its prefill elsewhere."""
        if not self._bring_up(request):
            return False
        if request.phase is Phase.RUNNING:
            self._publisher.publish_again(request)
        return True

    def _bring_up(self, request: Request) -> bool:
        """Swaps the block table in and allocates the rest; it runs, or is parked while it comes. False: no room."""
        if not self.pool.fits(request.block_table.view, request.num_tokens, self._num_owed):
            return False
        keep_cached(self.pool, self.room.upcoming(self._lookahead, request, self.num_cached))
        try:
            swap = self.pool.swap_in(request.block_table.view, request.holder)
            if not swap.has_ended:
                self.room.park(request, swap, is_own=True)
                return True
            swap.replace_in(request.block_table)
            self._cover(request, request.num_tokens)
        except OutOfBlocks:
            return False
        self._run(request)
        return True

    def _drop_swapped(self) -> bool:
        """Lets the last request in order that waits and still holds blocks be recomputed; False when there is none.

        Nothing runs and nothing can: what swapped requests share was left in HBM, or KV handed over here fills it.
        """
        for request in reversed(self.room.returning):
            if len(request.block_table):
                Recompute().preempt(request, self.pool)
                self.counts.dropped(request)
                return True
        return False

    def _run(self, request: Request) -> None:
        self.room.remove(request)
        self.running.append(request)
        request.phase = Phase.RUNNING
