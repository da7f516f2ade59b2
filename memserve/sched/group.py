"""Group: the instances of one role as the global scheduler sees them: beside what each holds, what it has to do."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from memserve.clock import to_ns, to_s
from memserve.decisions import Holding, RouteChoice
from memserve.latest import Latest
from memserve.sched.cost_model.base import CostModel
from memserve.sched.holders import Holders
from memserve.sched.prompt_tree import PromptIndex
from memserve.sched.routing import Chosen, ClusterSnapshot, Policy, RouteRequest, is_row
from memserve.values import given_int

LATELY = 16  # requests an instance
NUM_SESSIONS = 65_536  # whose instance is remembered

_ROW = np.dtype(  # what is counted of an instance
    [
        ("num_routed", np.int64),
        ("num_requests", np.int64),
        ("num_tokens", np.int64),
        ("queued_work", np.int64),
        ("queued_ns", np.int64),
        ("predicted_ns", np.int64),
        ("num_lately", np.float64),
        ("num_decoding", np.int64),
        ("free_blocks", np.float64),
        ("num_blocks", np.float64),
        ("said_s", np.float64),
    ],
    align=True,
)


@dataclass
class Assignment:
    """A request's place in a group. row: of its instance.  num_cached: tokens it was believed to have there.

    work: what it still adds to that instance's `queued_work`.  queued_ns, predicted_ns: the same in nanoseconds by the
    cost model, and as it is predicted.
    longest: who was believed to have most of it, longest first.  is_counted: it is still a part of that row's load.
    decodes: it has its first token.
    """

    row: int
    num_tokens: int
    num_cached: int
    work: int
    queued_ns: int
    predicted_ns: int
    longest: list[Holding]
    choice: RouteChoice
    is_counted: bool = False
    decodes: bool = False


class Group(Holders):
    """labels: of the instances, a row each.  incarnations: their numbers.  policy: chooses among them.  tree: what each
    is believed to have cached.  cost_model: says in the records what each choice costs, and what another would have;
    None where the group prefills nothing.  prediction: by which is said what a request would wait for; None: by that.
    num_gpus: of each instance.

    num_routed: attempts for which one of the instances was chosen first.
    """

    def __init__(
        self,
        labels: Sequence[str],
        incarnations: Sequence[int],
        policy: Policy,
        tree: PromptIndex,
        cost_model: CostModel | None = None,
        prediction: CostModel | None = None,
        num_gpus: int = 1,
    ) -> None:
        super().__init__(labels, incarnations, tree)
        self._policy, self._cost_model, self._prediction = policy, cost_model, prediction or cost_model
        self._num_gpus = num_gpus
        self._rows = _new_rows(len(labels))
        self._homes: Latest[str, int] = Latest(NUM_SESSIONS)  # row of each session
        self.num_routed = 0

    @property
    def num_routed_to(self) -> np.ndarray:
        """int64 [n]: requests that each row was given."""
        counts: np.ndarray = self._rows["num_routed"]
        return counts

    def num_requests(self, label: str) -> int:
        """Unfinished requests that an instance is named for; 0 for one of another group."""
        row = self.row_of(label)
        return 0 if row is None else int(self._rows["num_requests"][row])

    def add(self, label: str, incarnation: int) -> None:
        """An instance joins, the last row, with nothing to do and nothing cached."""
        super().add(label, incarnation)
        self._rows = np.append(self._rows, _new_rows(1))

    def says(self, label: str, num_free: int, num_blocks: int, said_ns: int) -> None:
        """An instance, if it is of this group, had so many blocks of HBM that nobody held, of so many."""
        if (row := self.row_of(label)) is not None:
            self._rows[["free_blocks", "num_blocks", "said_s"]][row] = (num_free, num_blocks, to_s(said_ns))

    def snapshot(self, rows: np.ndarray, num_cached: np.ndarray, session_id: str, now_ns: int) -> ClusterSnapshot:
        """What the policy sees now of some rows, for a request of a session.

        num_cached: int64 [n], of these rows; nobody writes to it any more.
        """
        home = np.flatnonzero(rows == self._homes.get(session_id, -1))
        these = self._rows.take(rows)  # a copy, once for all columns: of records, indexing takes many times as long
        these.setflags(write=False)
        return ClusterSnapshot(
            labels=self.labels if len(rows) == len(self.labels) else tuple(self.labels[row] for row in rows),
            num_requests=these["num_requests"],
            num_tokens=these["num_tokens"],
            num_routed=self.num_routed,
            num_cached=_read_only(num_cached),
            queued_work=these["queued_work"],
            num_lately=these["num_lately"],
            home=int(home[0]) if len(home) else None,
            now_s=to_s(now_ns),
            num_decoding=these["num_decoding"],
            num_gpus=_read_only(np.full(len(rows), self._num_gpus)),
            free_blocks=these["free_blocks"],
            num_blocks=these["num_blocks"],
            said_s=these["said_s"],
        )

    def choose(
        self, request: RouteRequest, now_ns: int, rng: np.random.Generator, tried: Collection[int] = ()
    ) -> Assignment:
        """Where the request is to go; it is not counted there before `take`. Raises ValueError where the policy names
        none of the instances, or work that is none.
        """
        num_tokens, rows = len(request.tokens), self.rows(tried)
        num_cached = self._num_cached(request.tokens, rows, now_ns)
        snapshot = self.snapshot(rows, num_cached, request.session_id, now_ns)
        chosen = self._policy.choose(request, snapshot, rng)
        if not is_row(chosen, len(rows)):
            names = ", ".join(self.labels[row] for row in rows)
            raise ValueError(
                f"{type(self._policy).__name__} chose row {chosen!r}: expected 0 to {len(rows) - 1} ({names})"
            )
        return self._assign(snapshot, rows, chosen, num_tokens)

    def place_at(self, row: int, why: str, request: RouteRequest, now_ns: int) -> Assignment:
        """A place for the request at an instance that is named already, as `choose`; the policy is not asked."""
        rows = np.array([row])
        snapshot = self.snapshot(rows, self._num_cached(request.tokens, rows, now_ns), request.session_id, now_ns)
        return self._assign(snapshot, rows, Chosen(0, why), len(request.tokens))

    def take(self, placement: Assignment, session_id: str) -> None:
        """The request goes there."""
        self._rows["num_routed"][placement.row] += 1
        self._rows["num_lately"] *= 1 - 1 / (LATELY * np.count_nonzero(self._here))
        self._rows["num_lately"][placement.row] += 1
        self._homes[session_id] = placement.row
        self._count(placement, 1)
        placement.is_counted = True

    def load(self, row: int) -> tuple[int, int]:
        """Unfinished requests of an instance, and the tokens of their prompts."""
        return int(self._rows["num_requests"][row]), int(self._rows["num_tokens"][row])

    def predicted_ns(self, row: int) -> int:
        """Nanoseconds that the prefills which wait at an instance are predicted to take."""
        return int(self._rows["predicted_ns"][row])

    def _assign(self, snapshot: ClusterSnapshot, rows: np.ndarray, chosen: int, num_tokens: int) -> Assignment:
        """A place in one of `rows`, and the record of why there."""
        num_cached, costs = snapshot.num_cached, self._cost_model
        held = int(num_cached[chosen])
        choice = RouteChoice(
            snapshot.labels,
            int(chosen),
            chosen.why if isinstance(chosen, Chosen) else "",
            num_tokens,
            num_cached,
            snapshot.num_requests.copy(),  # alone: records are kept, and there may be a million
            self._rows["queued_ns"][rows],
            None if costs is None else costs.exec_time_s,
        )
        work = given_int(
            self._policy, "work", self._policy.work(held, num_tokens - held), 0, unit="in the policy's own unit"
        )
        queued_ns = predicted_ns = 0 if costs is None else to_ns(costs.exec_time_s(held, num_tokens - held))
        if self._prediction is not None and self._prediction is not costs:
            predicted_ns = to_ns(self._prediction.exec_time_s(held, num_tokens - held))
        longest = self._longest(rows, num_cached)
        return Assignment(int(rows[chosen]), num_tokens, held, work, queued_ns, predicted_ns, longest, choice)

    def prefilled(self, placement: Assignment) -> None:
        """Its first token is there: it waits in no queue any more."""
        self._rows["queued_work"][placement.row] -= placement.work
        self._rows["queued_ns"][placement.row] -= placement.queued_ns
        self._rows["predicted_ns"][placement.row] -= placement.predicted_ns
        placement.work = placement.queued_ns = placement.predicted_ns = 0
        self.decodes(placement)

    def decodes(self, placement: Assignment) -> None:
        """Its first token is there, in this group or in the one before."""
        if placement.is_counted and not placement.decodes:
            self._rows["num_decoding"][placement.row] += 1
            placement.decodes = True

    @property
    def listens(self) -> bool:
        """Whether the policy wants to hear of answers."""
        return type(self._policy).answered is not Policy.answered

    def answered(self, placement: Assignment, request: RouteRequest, num_generated: int, now_ns: int) -> None:
        """The request has been answered where it was placed."""
        self._policy.answered(request, self.labels[placement.row], num_generated, to_s(now_ns))

    def forget(self, placement: Assignment) -> None:
        """A request has ended, or left its instance; said twice, it counts once."""
        if placement.is_counted:
            self._count(placement, -1)
            self._rows["num_decoding"][placement.row] -= placement.decodes
        placement.is_counted = placement.decodes = False

    def _count(self, placement: Assignment, sign: int) -> None:
        self._rows["num_requests"][placement.row] += sign
        self._rows["num_tokens"][placement.row] += sign * placement.num_tokens
        self._rows["queued_work"][placement.row] += sign * placement.work
        self._rows["queued_ns"][placement.row] += sign * placement.queued_ns
        self._rows["predicted_ns"][placement.row] += sign * placement.predicted_ns


def _read_only(column: np.ndarray) -> np.ndarray:
    """The same array, for a policy to look at: what a choice is recorded and counted by is read from it afterwards."""
    column.setflags(write=False)
    return column


def _new_rows(num_rows: int) -> np.ndarray:
    """Instances that have nothing to do."""
    rows = np.zeros(num_rows, dtype=_ROW)
    rows["said_s"] = -np.inf
    rows["free_blocks"] = rows["num_blocks"] = np.inf
    return rows
