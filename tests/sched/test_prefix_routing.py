import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from mini_cluster import group_of

from memserve import LocalCluster, load_config
from memserve.messages import Finished, HandoffEnded, Submit, Tokens, pack_times, pack_tokens
from memserve.request import FinishReason, Role
from memserve.sampling_params import SamplingParams
from memserve.sched.cost_model.fixed import FixedCostModel
from memserve.sched.global_scheduler import GlobalScheduler
from memserve.sched.modes import PDBasic, PDCaching2, PDCaching3
from memserve.sched.prefix_routing import BalancedPrefix, CostBased, LeastKV, PromptTree
from memserve.sched.prompt_tree import NoPromptTree, Optimistic
from memserve.sched.routing import ClusterSnapshot, LeastLoad, Policy, RouteRequest, SessionAffinity

README = Path(__file__).parents[2] / "README.md"
COSTS = FixedCostModel(step_s=0.01, prefill_token_s=0.001, decode_token_s=0.0001)
REQUEST = RouteRequest("r", "s", np.arange(100, dtype=np.int32), 0.0, 16)


def choose(policy, cached, requests=None, tokens=None, work=None, lately=None, home=None):
    return chosen_and_why(policy, cached, requests, tokens, work, lately, home)[0]


def chosen_and_why(policy, cached, requests=None, tokens=None, work=None, lately=None, home=None):
    zeros = [0] * len(cached)
    labels = tuple(f"prefill-{i}" for i in range(len(cached)))
    columns = [np.array(c or zeros, dtype=np.int64) for c in (requests, tokens)]
    more = [np.array(c or zeros, dtype=kind) for c, kind in ((work, np.int64), (lately, np.float64))]
    nothing_said = (0.0, *[np.array(zeros)] * 5)
    snapshot = ClusterSnapshot(labels, *columns, 0, np.array(cached), *more, home, *nothing_said)
    row = policy.choose(REQUEST, snapshot, np.random.default_rng(0))
    return row, getattr(row, "why", "")


def test_prompt_tree_takes_the_longest_prefix_and_among_equals_the_least_load():
    assert choose(PromptTree(), [16, 64, 32], [0, 9, 0]) == 1
    assert choose(PromptTree(), [64, 64, 32], [3, 2, 0]) == 1
    assert choose(PromptTree(), [0, 0, 0], [3, 2, 1]) == 2


def test_prompt_tree_passes_over_an_instance_that_leads_by_too_much():
    assert choose(PromptTree(max_lead=2), [16, 64, 32], [0, 1, 0]) == 1
    assert choose(PromptTree(max_lead=2), [16, 64, 32], [0, 2, 1]) == 2
    assert choose(PromptTree(max_lead=1), [64, 64], [7, 7]) in (0, 1)


@pytest.mark.parametrize("kind", [PromptTree, CostBased, BalancedPrefix])
def test_a_plain_word_is_the_class_alone_and_a_bounded_one_says_its_bound(kind):
    word = {PromptTree: "prompt_tree", CostBased: "cost_based", BalancedPrefix: "balanced_prefix"}[kind]
    defaults = {name: p.default for name, p in inspect.signature(kind).parameters.items() if name != "cost_model"}
    plain, bounded = (dict(load_config([f"policy={word}{end}"]).policy) for end in ("", "_bounded"))
    assert {"_target_": f"{kind.__module__}.{kind.__name__}", **defaults} == plain
    (bound,) = (name for name in ("max_lead", "max_skew") if name in plain)
    assert plain[bound] is None and bounded == {**plain, bound: {"max_lead": 2, "max_skew": 1.75}[bound]}


def test_the_figures_of_the_paper_are_simulated_with_its_rule():
    for figure in ("fig8_loogle", "fig8_sharegpt", "fig15"):
        assert load_config([f"+experiment={figure}"]).policy == load_config(["policy=prompt_tree"]).policy


def test_cost_based_weighs_what_is_queued_against_what_is_cached():
    ms = 10**6
    assert choose(CostBased(COSTS), [0, 80]) == 1
    assert choose(CostBased(COSTS), [0, 80], work=[0, 79 * ms]) == 1
    assert choose(CostBased(COSTS), [0, 80], work=[0, 81 * ms]) == 0
    assert CostBased(COSTS).work(80, 20) == 30 * ms


def test_cost_based_passes_over_who_lately_took_more_than_its_skew():
    policy = CostBased(COSTS, max_skew=1.5)
    assert chosen_and_why(policy, [0, 80, 16], lately=[1, 5, 1]) == (2, "soonest first token but for who took most")
    assert chosen_and_why(policy, [0, 80, 16], lately=[1, 3, 1]) == (1, "soonest first token")
    assert choose(CostBased(COSTS), [0, 80, 16], lately=[0, 99, 0]) == 1, "Eq. 1 alone"


def test_policies_say_why_in_a_few_words():
    assert chosen_and_why(PromptTree(max_lead=2), [0, 64], [0, 1]) == (1, "longest prefix")
    assert chosen_and_why(PromptTree(max_lead=2), [0, 64], [0, 2]) == (0, "longest prefix but for who leads")
    assert chosen_and_why(PromptTree(), [0, 0], [1, 0]) == (1, "least load: nothing is cached")
    balanced = BalancedPrefix(abs_bound=3, rel_bound=2, min_share=0.5)
    assert chosen_and_why(balanced, [0, 64], [0, 4])[1] == "least load: it is uneven"
    assert chosen_and_why(balanced, [0, 48], [0, 1])[1] == "least load: no long prefix"
    assert chosen_and_why(LeastLoad(), [0, 48], [0, 1])[1] == "least load"


def test_a_prefix_that_all_begin_with_does_not_draw_all_to_one_instance():
    """Nothing ever queues, and each prompt ends before the next one comes."""
    shared = np.arange(40)

    def spread(policy):
        scheduler = scheduler_of(policy, labels=("i-0", "i-1", "i-2", "i-3"))
        for i in range(60):
            serve(scheduler, f"r{i}", np.append(shared, 100 + i), [1], f"s{i}", now_ns=i)
        return sorted(scheduler.groups.takers.num_routed_to.tolist())

    for policy in (CostBased(COSTS), BalancedPrefix()):
        assert spread(policy) == [0, 0, 0, 60]
    for policy in (CostBased(COSTS, max_skew=1.75), BalancedPrefix(max_skew=1.75)):
        even = spread(policy)
        assert even[1] > 0 and even[-1] <= 1.75 * 15 + 2


@pytest.mark.parametrize("policy", [CostBased(COSTS, max_skew=1.5), BalancedPrefix(max_skew=1.5)])
def test_a_session_stays_where_its_history_is_however_much_went_there_lately(policy):
    assert choose(policy, [0, 80, 64], lately=[1, 5, 1]) == 2, "a new session"
    assert choose(policy, [0, 80, 64], lately=[1, 5, 1], home=1) == 1
    assert choose(policy, [0, 80, 64], lately=[1, 5, 1], home=0) == 2, "there, and its history is elsewhere"


def test_sessions_of_many_turns_spread_and_each_turn_finds_the_one_before():
    shared = np.arange(40)
    scheduler = scheduler_of(CostBased(COSTS, max_skew=1.75), labels=("i-0", "i-1", "i-2", "i-3"))
    history = {f"s{i}": np.append(shared, 100 * i + np.arange(100, 120)) for i in range(16)}
    homes = {}
    for turn in range(4):
        for session, prompt in history.items():
            label = serve(scheduler, f"{session}.{turn}", prompt, [1, 2], session)
            assert homes.setdefault(session, label) == label
            history[session] = np.append(prompt, [1, 2, turn])
    assert max(np.unique(list(homes.values()), return_counts=True)[1]) <= 1.75 * 4 + 1


def test_the_instance_of_a_session_is_forgotten_with_it_and_with_the_instance(monkeypatch):
    monkeypatch.setattr("memserve.sched.group.NUM_SESSIONS", 2)
    seen = []

    class Looks(Policy):
        def choose(self, request, cluster, rng):
            seen.append(cluster.home)
            return len(seen) % 2

    scheduler = scheduler_of(Looks())
    for name, session in enumerate("aabcab"):
        serve(scheduler, str(name), np.arange(5), [1], session)
    assert seen == [None, 1, None, None, None, None]
    scheduler.groups.takers.remove("i-1")
    rows = scheduler.groups.takers.rows()
    assert [scheduler.groups.takers.snapshot(rows, np.zeros(1), session, 0).home for session in "ab"] == [None, 0]


def test_each_choice_is_recorded_with_what_it_would_have_cost_elsewhere():
    scheduler = scheduler_of(CostBased(COSTS), tree=Optimistic(2, 4))
    scheduler.groups.takers = group_of(["i-0", "i-1"], CostBased(COSTS), Optimistic(2, 4), COSTS)
    label = serve(scheduler, "a", np.arange(12), [1])
    serve(scheduler, "b", np.arange(21), [1])
    [choice] = scheduler.timelines["b"].routes
    here = int(label[-1])
    assert choice.labels == ("i-0", "i-1") and choice.chosen == here and choice.why == "soonest first token"
    assert choice.num_cached[here] == 12 and choice.num_cached[1 - here] == 0
    assert choice.first_token_s.tolist()[here] == pytest.approx(0.01 + 9 * 0.001)
    assert choice.elsewhere_s == pytest.approx(0.01 + 21 * 0.001) and choice.regret_s == 0


def test_balanced_prefix_follows_locality_until_the_load_is_uneven_or_the_prefix_short():
    policy = BalancedPrefix(abs_bound=3, rel_bound=2, min_share=0.5)
    assert choose(policy, [0, 64], [0, 3]) == 1
    assert choose(policy, [0, 64], [0, 4]) == 0
    assert choose(policy, [0, 64], [5, 9]) == 1  # 4 more, and less than twice as many
    assert choose(policy, [0, 48], [0, 1]) == 0


def test_balanced_prefix_passes_over_who_lately_took_more_than_its_skew():
    policy = BalancedPrefix(abs_bound=3, rel_bound=2, min_share=0.5, max_skew=1.5)
    assert chosen_and_why(policy, [0, 80, 64], lately=[1, 5, 1]) == (2, "longest prefix but for who took most")
    assert chosen_and_why(policy, [0, 80, 16], lately=[1, 3, 1]) == (1, "longest prefix")
    assert chosen_and_why(policy, [16, 80, 0], [1, 0, 0], lately=[1, 5, 1]) == (2, "least load: no long prefix")
    assert choose(BalancedPrefix(), [0, 80, 64], lately=[0, 99, 0]) == 1, "the practice alone"


def test_least_kv_weighs_a_prefix_against_load_in_tokens():
    assert choose(LeastKV(), [0, 50], tokens=[100, 149]) == 1
    assert choose(LeastKV(), [0, 50], tokens=[100, 151]) == 0
    assert choose(LeastKV(), [0, 0], [2, 1], [100, 100]) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptTree(0), "max_lead=0: expected null or an integer >= 1"),
        (lambda: BalancedPrefix(abs_bound=-1), "abs_bound=-1"),
        (lambda: BalancedPrefix(rel_bound=0.5), "rel_bound=0.5: expected a finite number >= 1"),
        (lambda: BalancedPrefix(min_share=1.5), "min_share=1.5"),
        (lambda: BalancedPrefix(max_skew=0.5), "max_skew=0.5: expected null or a finite number >= 1"),
        (lambda: CostBased(COSTS, max_skew=0.5), "max_skew=0.5: expected null or a finite number >= 1"),
        (lambda: CostBased(object()), "cost_model=object: expected a CostModel"),
    ],
)
def test_bounds_out_of_range_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def scheduler_of(policy, mode=None, decode=None, tree=None, labels=("i-0", "i-1")):
    group = group_of(list(labels), policy, tree or Optimistic(len(labels), 4))
    options = {} if mode is None else {"mode": mode, "decode": decode}
    return GlobalScheduler(group, np.random.default_rng(0), **options)


def serve(scheduler, name, prompt, output, session="s", now_ns=0):
    """Submits and answers a request; the instance that got it."""
    scheduler.receive(Submit(name, session, pack_tokens(prompt), SamplingParams(), now_ns), now_ns)
    [(label, _)] = [pair for pair in scheduler.drain_outbox() if pair[0] != "client"]
    for i, token in enumerate(output):
        scheduler.receive(Tokens(name, 0, i, pack_tokens(np.array([token])), pack_times(np.array([now_ns]))), now_ns)
    scheduler.receive(Finished(name, 0, FinishReason.LENGTH, "", None), now_ns)
    scheduler.drain_outbox()
    return label


def test_a_turn_goes_where_the_one_before_it_left_its_kv():
    scheduler = scheduler_of(PromptTree())
    prompt, output = np.arange(12), np.arange(100, 106)
    first = serve(scheduler, "a", prompt, output)
    turn = np.concatenate([prompt, output, np.arange(7)])
    assert serve(scheduler, "b", turn, [1]) == first
    assert scheduler.timelines["b"].num_promised == 16  # whole blocks of 12 + 6 - 1 tokens
    assert scheduler.timelines["a"].num_promised == 0


@pytest.mark.parametrize(
    ("mode", "at_prefill", "at_decode"), [(PDBasic(), 0, 0), (PDCaching2(), 12, 16), (PDCaching3(), 16, 16)]
)
def test_each_roles_tree_learns_what_the_mode_leaves_there(mode, at_prefill, at_decode):
    decode = group_of(["d-0"], LeastKV(), Optimistic(1, 4))
    scheduler = scheduler_of(PromptTree(), mode, decode, labels=("p-0",))
    serve(scheduler, "a", np.arange(12), np.arange(100, 106))
    path = pack_tokens(np.concatenate([np.arange(12), np.arange(100, 106)]))
    assert scheduler.groups.takers.tree.match(path, 1).tolist() == [at_prefill]
    assert decode.tree.match(path, 1).tolist() == [at_decode]


@pytest.mark.parametrize("mode", [PDCaching2(), PDCaching3()])
def test_an_answer_of_one_token_teaches_the_decode_tree_nothing(mode):
    decode = group_of(["d-0"], LeastKV(), Optimistic(1, 4))
    scheduler = scheduler_of(PromptTree(), mode, decode, labels=("p-0",))
    serve(scheduler, "a", np.arange(12), [1])
    assert scheduler.groups.takers.tree.num_blocks == 3 and decode.tree.num_blocks == 0


@pytest.mark.parametrize("most", [1, 9])
def test_the_decode_tree_believes_what_the_decode_instance_has(most):
    words = ["exec=simulated", "cluster=1p1d", "mode=pd_caching_2", "policy@decode_policy=least_kv"]
    words += ["workload=synthetic", "workload.num_sessions=6", "workload.prompt_tokens=64"]
    words += [f"workload.max_output_tokens={most}"]
    cluster = LocalCluster(load_config(words)).cluster()
    while cluster.advance():
        pass
    (pool,) = [node.instance.pool for node in cluster.nodes if node.instance.role is Role.DECODE]
    assert cluster.scheduler.groups.decode.tree.num_blocks == pool.index.num_blocks == (0 if most == 1 else 24)


def test_an_instance_that_is_gone_is_forgotten_in_the_trees():
    scheduler = scheduler_of(PromptTree())
    label = serve(scheduler, "a", np.arange(12), [1])
    scheduler.instance_gone(label, 1)
    assert serve(scheduler, "b", np.arange(12), [1]) != label
    scheduler.instance_back(label, 2)
    assert scheduler.groups.takers.tree.match(pack_tokens(np.arange(12)), 2)[int(label[-1])] == 0


def test_queued_work_is_what_has_no_first_token_yet():
    scheduler = scheduler_of(CostBased(COSTS), labels=("i-0",))
    group = scheduler.groups.takers

    def work():
        return group.snapshot(group.rows(), np.zeros(1, dtype=np.int64), "s", 0).queued_work.tolist()

    for name in "ab":
        scheduler.receive(Submit(name, "s", pack_tokens(np.arange(10)), SamplingParams(), 0), 0)
    assert work() == [2 * COSTS_NS]
    scheduler.receive(Tokens("a", 0, 0, pack_tokens(np.array([1])), pack_times(np.array([0]))), 0)
    assert work() == [COSTS_NS]
    scheduler.receive(Finished("a", 0, FinishReason.LENGTH, "", None), 0)
    scheduler.receive(Finished("b", 0, FinishReason.ABORTED, "", None), 0)
    assert work() == [0]


COSTS_NS = 20 * 10**6  # a step, and 10 tokens


def test_a_policy_that_names_an_unknown_instance_is_refused_with_the_known_ones():
    class ByName(Policy):
        def choose(self, request, cluster, rng):
            return "decode-9"

    with pytest.raises(ValueError, match=r"ByName chose row 'decode-9': expected 0 to 1 \(i-0, i-1\)"):
        serve(scheduler_of(ByName()), "a", np.arange(3), [1])


class StickyUnlessBusy(Policy):
    """A session's own instance, unless it has twice the mean load; then the longest prefix."""

    looks_at_prefixes = True

    def __init__(self, factor: float = 2.0) -> None:
        self._factor, self._own = factor, SessionAffinity()

    def choose(self, request, cluster, rng):
        own = self._own.choose(request, cluster, rng)
        if cluster.num_requests[own] <= self._factor * cluster.num_requests.mean():
            return own
        return int(np.argmax(cluster.num_cached - cluster.num_tokens))


def test_the_policy_that_the_readme_shows_works_as_it_stands():
    (code,) = re.findall(r"```python\n(from memserve.sched.routing import Policy.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    assert choose(names["FewestNewTokens"](), [0, 64, 32], work=[10, 90, 30]) == 2


def test_a_policy_of_ones_own_is_one_class():
    own = choose(StickyUnlessBusy(), [0, 0, 0])
    loads = [0, 0, 0]
    loads[own] = 9
    cached = [40, 40, 40]
    cached[(own + 1) % 3] = 80
    assert choose(StickyUnlessBusy(), cached, loads) == (own + 1) % 3


def test_placing_a_request_among_64_instances_asks_the_tree_once():
    class Counting(Optimistic):
        num_matches = 0

        def match(self, tokens, now_ns):
            self.num_matches += 1
            return super().match(tokens, now_ns)

    tree = Counting(64, 4)
    scheduler = scheduler_of(PromptTree(), tree=tree, labels=[f"i-{i}" for i in range(64)])
    serve(scheduler, "a", np.arange(400), [1])
    assert tree.num_matches == 1 and scheduler.groups.takers.num_routed_to.sum() == 1


def test_no_tree_leaves_load_alone_to_decide():
    scheduler = scheduler_of(LeastLoad(), tree=NoPromptTree(2, 4))
    serve(scheduler, "a", np.arange(12), [1])
    assert scheduler.groups.tree_counts() == {"tree_blocks": 0, "tree_evicted_blocks": 0, "tree_expired_blocks": 0}


@pytest.mark.parametrize("is_told", [True, False])
def test_who_was_handed_over_is_not_lost_with_its_prefill_instance_and_is_its_load_no_more(is_told):
    decode = group_of(["d-0"], LeastKV(), Optimistic(1, 4))
    scheduler = scheduler_of(PromptTree(), PDBasic(), decode, labels=("p-0", "p-1"))
    scheduler.receive(Submit("a", "s", pack_tokens(np.arange(9)), SamplingParams(), 0), 0)
    [(label, _)] = scheduler.drain_outbox()
    scheduler.receive(Tokens("a", 0, 0, pack_tokens(np.array([1])), pack_times(np.array([0]))), 0)
    assert scheduler.groups.takers.num_requests(label) == 1, "it waits there to be handed over"
    if is_told:
        scheduler.receive(HandoffEnded("a", 0, label, done=True), 1)
        assert scheduler.groups.takers.num_requests(label) == 0
    scheduler.instance_gone(label, 2)
    assert scheduler.timelines["a"].attempt == (0 if is_told else 1)
    assert all(scheduler.groups.takers.num_requests(name) == (not is_told and name != label) for name in ("p-0", "p-1"))
