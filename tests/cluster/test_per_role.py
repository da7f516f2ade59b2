"""Clusters whose instances differ by role, in options, costs and ranks: what they do in virtual time."""

import pytest
from cluster.playing import tokens_of

from memserve import LocalCluster, load_config
from memserve.config.errors import ConfigError
from memserve.kvcache.eviction import LFU, LRU
from memserve.request import Role
from memserve.sched.cost_model.fixed import FixedCostModel

SIMULATED = ["exec=simulated", "cluster=1p1d", "mode=pd_caching_3", "workload.num_sessions=6"]
SYNTHETIC = ["workload=synthetic", "workload.num_sessions=4", "workload.rate=0.1", "workload.prompt_tokens=256",
             "workload.max_output_tokens=5"]  # fmt: skip
LLAMA = ["tokens=workload", "geometry=llama3_8b", "layout=aggregated", "granularity=by_request_agg"]


def local(*words):
    return LocalCluster(load_config(words))


def answers(result):
    return tokens_of(result.timelines)


def test_each_instance_is_built_by_its_role_s_options_and_answers_are_the_same():
    theirs = ["+per_role.decode.kvcache.num_hbm_blocks=300", "+per_role.decode.sched.max_running=3",
              "+per_role.prefill.kvcache.num_dram_blocks=40", "+per_role.prefill.kvcache.num_hbm_blocks=170",
              "+eviction@per_role.prefill.eviction=lfu", "+per_role.prefill.sched.chunk_size=16"]  # fmt: skip
    system = local(*SIMULATED, *theirs)
    assert system.memory.startswith("prefill: 170 blocks of 16 tokens") and " | decode: 300 blocks" in system.memory
    prefill, decode = (node.instance for node in system.cluster().nodes)
    assert (prefill.pool.allocator.num_blocks, prefill.pool.allocator.num_dram_blocks) == (170, 40)
    assert (decode.pool.allocator.num_blocks, decode.pool.allocator.num_dram_blocks) == (300, 0)
    orders = [type(node_pool.index._eviction) for node_pool in (prefill.pool, decode.pool)]
    assert orders == [LFU, LRU]
    assert answers(system.run_once()) == answers(local(*SIMULATED).run_once())


def test_a_real_model_answers_the_same_from_pools_of_different_sizes():
    words = ["model=tiny", "step_time=model", *SIMULATED[1:], "workload.max_output_tokens=6"]
    alike = local(*words).run_once()
    differ = local(
        *words, "+per_role.decode.kvcache.num_hbm_blocks=170", "+per_role.decode.sched.max_running=2"
    ).run_once()
    assert answers(differ) == answers(alike)


def test_steps_take_what_the_costs_of_their_role_say():
    alike = local(*SIMULATED, *SYNTHETIC).run()
    slower = local(*SIMULATED, *SYNTHETIC, "+per_role.decode.cost_model.step_s=0.1").run()
    assert slower["ttft_s"] == alike["ttft_s"]
    last = ["mean", "p50"]
    assert [slower["decode_itl_s"][name] - alike["decode_itl_s"][name] for name in last] == pytest.approx(
        [0.09] * 2, rel=1e-3
    )


def test_who_comes_later_and_who_changes_its_role_has_the_new_role_s_options():
    changes = "scaling.changes=[{at_s: 0.1, add: decode}, {at_s: 0.2, switch: prefill-0, to: decode}]"
    theirs = ["cluster=2p1d", "+per_role.decode.kvcache.num_hbm_blocks=333"]
    system = local(*SIMULATED, "scaling=schedule", changes, *theirs)
    cluster = system.cluster()
    system.play(cluster)
    sizes = {node.instance.label: node.instance.pool.allocator.num_blocks for node in cluster.nodes}
    roles = {node.instance.label: node.instance.role for node in cluster.nodes}
    assert len(sizes) == 4 and sorted(roles.values()) == [Role.DECODE] * 3 + [Role.PREFILL]
    assert all((size == 333) == (roles[label] is Role.DECODE) for label, size in sizes.items())


def test_policies_and_early_rejection_are_given_the_costs_of_the_role_that_they_are_about():
    words = [*SIMULATED, "policy=cost_based", "policy@decode_policy=cost_based", "rejection=early", "slo.tpot_s=0.05"]
    slow = "+per_role.decode.cost_model.step_s=0.2"
    assert local(*words).run()["num_failed"] == 0
    report = local(*words, slow).run()
    assert report["num_finished"] == 0 and report["failures"] == {"refused": 6}
    scheduler = local(*words, slow).cluster().scheduler
    for group, step_s in ((scheduler.groups.takers, 0.01), (scheduler.groups.decode, 0.2)):
        costs = group._policy._cost_model
        assert isinstance(costs, FixedCostModel) and costs.exec_time_s(0, 1) == pytest.approx(step_s, abs=1e-3)


def handed_over(*words):
    """(bytes, calls, seconds of the hand-off) of one prompt of 256 tokens."""
    result = local(*SIMULATED, *LLAMA, *SYNTHETIC, "workload.num_sessions=1", "mode=pd_basic", *words).run_once()
    sent = result.report["transfers"]["p_to_d"]
    return sent["bytes"], sent["calls"], result.report["phases_s"]["transfer"]["p50"]


def sizes(prefill, decode):
    return [f"cluster.tensor_parallel.prefill={prefill}", f"cluster.tensor_parallel.decode={decode}"]


LINK = ["link.latency_s=0", "link.gb_per_s=1", "link.message_latency_s=0"]


def test_ranks_send_their_heads_at_the_same_time_whatever_the_numbers_at_both_ends():
    whole = 256 * 2 * 32 * 8 * 128 * 2
    assert handed_over(*LINK)[:2] == (whole, 16)
    for prefill, decode in ((2, 2), (4, 2), (1, 8), (8, 4)):
        pairs = max(prefill, decode)
        num_bytes, _, seconds = handed_over(*LINK, *sizes(prefill, decode), "link.contention=false")
        assert num_bytes == whole and seconds == pytest.approx(whole / pairs / 1e9, rel=1e-6)
    for prefill, decode in ((4, 2), (1, 8), (8, 4)):  # whoever has fewer ranks has fewer ports
        seconds = handed_over(*LINK, *sizes(prefill, decode))[2]
        assert seconds == pytest.approx(whole / min(prefill, decode) / 1e9, rel=1e-6)


def test_a_fetch_is_priced_as_what_one_pair_of_ranks_moves():
    words = [*SIMULATED, *LLAMA, *LINK, "cluster=colocated_2", "mode=colocated", "fetch=cost"]
    priced = {}
    for ranks in (1, 4):
        cfg = load_config([*words, f"cluster.tensor_parallel.every={ranks}"])
        fetches = local(*words, f"cluster.tensor_parallel.every={ranks}").cluster().nodes[0].instance.handoffs.fetches
        priced[ranks] = fetches._prices.transfer.fetch_time_s(10)
        assert cfg.fetch
    assert priced[4] == pytest.approx(priced[1] / 4)


@pytest.mark.parametrize("granularity", ["by_layer", "by_request_agg"])
def test_an_instance_of_several_ranks_that_dies_in_the_middle_of_a_transfer_takes_all_of_them_with_it(granularity):
    roles = ["cluster.roles=[prefill,prefill,decode,decode]", "policy=round_robin", *sizes(4, 2)]
    rest = [f"granularity={granularity}", "link.gb_per_s=5", "workload.rate=20", "workload.num_sessions=8"]
    system = local(*SIMULATED, *LLAMA, *SYNTHETIC, *roles, *rest)
    for at_ns in range(20_000_000, 420_000_000, 40_000_000):
        cluster = system.cluster()
        cluster.call_at(at_ns, lambda cluster=cluster: [cluster.crash(label) for label in ("prefill-0", "decode-3")])
        result = system.play(cluster)
        assert result.report["num_finished"] == 8 and result.report["quarantined_blocks"] == 0
        for node in cluster.nodes:
            assert node.is_gone or node.instance.handoffs.transfers.num_open == 0


def test_blocks_are_of_what_a_rank_holds():
    words = [*SIMULATED, *LLAMA, "kvcache.num_hbm_blocks=null", "kvcache.hbm_bytes=1GiB"]
    by_ranks = {}
    for ranks in (1, 2):
        [node, _] = local(*words, f"cluster.tensor_parallel.every={ranks}").cluster().nodes
        by_ranks[ranks] = node.instance.pool.allocator.num_blocks
    assert by_ranks == {1: 512, 2: 1024}


def test_bytes_of_a_role_that_hold_no_block_are_refused_by_their_name():
    words = [*SIMULATED, *LLAMA, "kvcache.num_hbm_blocks=null", "kvcache.hbm_bytes=1GiB"]
    for option in ("per_role.decode.kvcache.hbm_bytes", "kvcache.hbm_bytes"):
        with pytest.raises(ConfigError, match=rf"^{option}=9: expected at least the 2097152 bytes of one block"):
            local(*words, f"{'+' * option.startswith('per')}{option}=9")


@pytest.mark.parametrize("mode", ["pd_basic", "pd_caching_2", "pd_caching_3"])
@pytest.mark.parametrize("granularity", ["by_layer", "by_request"])
def test_a_request_is_refused_only_where_the_prompt_or_the_whole_never_fits_who_has_to_hold_it(mode, granularity):
    one = [*SIMULATED, *SYNTHETIC, "workload.num_sessions=1", f"mode={mode}", f"granularity={granularity}"]
    whole = [*one, "workload.prompt_tokens=64", "workload.max_output_tokens=17"]  # 64 + 16 tokens have KV: 5 blocks
    sizes = "+per_role.prefill.kvcache.num_hbm_blocks={}", "+per_role.decode.kvcache.num_hbm_blocks={}"
    for num_prefill, num_decode, named in (
        (4, 5, None),
        (3, 5, "the prompt's 64 tokens need 4 blocks of 16 tokens: the pool has 3"),
        (4, 4, "max_tokens=17 need 5 blocks of 16 tokens: the pool of an instance that decodes has 4"),
    ):
        words = [word.format(size) for word, size in zip(sizes, (num_prefill, num_decode), strict=True)]
        [timeline] = local(*whole, "sched.decode_headroom_blocks=0", *words).run_once().timelines
        assert timeline.succeeded == (named is None) and (named or "") in (timeline.detail or ""), timeline
