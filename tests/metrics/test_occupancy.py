import json

import numpy as np
import pytest

from memserve.cluster.local import LocalCluster
from memserve.compose import load_config
from memserve.kvcache.address import Medium
from memserve.kvcache.block_pool import BlockPool
from memserve.kvcache.radix import RadixIndex
from memserve.metrics.occupancy import KINDS, Occupancy, count_blocks, load_occupancy
from memserve.metrics.plots import draw_occupancy

SMALL = ["exec=simulated", "workload.num_sessions=6", "workload.max_turns=3", "workload.max_output_tokens=40"]


def make_pool(num_blocks=20, num_dram_blocks=0):
    return BlockPool(num_blocks, 4, RadixIndex, num_dram_blocks=num_dram_blocks)


def nonzero(counts):
    return {kind: count for kind, count in counts.items() if count}


def test_every_block_is_counted_once_under_the_kind_of_its_holders():
    pool = make_pool(20, 10)
    cached = pool.alloc(6, ("request", "a", 0))
    pool.publish(np.arange(24, dtype=np.int32), cached)
    assert nonzero(count_blocks(pool)[0]) == {"both": 6, "free": 14}
    pool.release(cached[4:], ("request", "a", 0))
    pool.alloc(3, ("request", "b", 0))
    assert nonzero(count_blocks(pool)[0]) == {"both": 4, "index": 2, "request": 3, "free": 11}
    pool.alloc(2, ("request", "b", 0), Medium.DRAM)
    pool.swap_out(1)
    hbm, dram = count_blocks(pool)
    assert nonzero(hbm) == {"both": 4, "index": 1, "request": 3, "free": 12}
    assert nonzero(dram) == {"index": 1, "request": 2, "free": 7}


def test_blocks_of_transfers_and_of_the_quarantine_are_set_apart_and_counted_once():
    pool = make_pool(20, 10)
    blocks = pool.alloc(6, ("request", "a", 0))
    pool.publish(np.arange(16, dtype=np.int32), blocks[:4])
    pool.retain(blocks[2:], ("transfer", 7))
    pool.retain(blocks[3:5], ("transfer", 8))
    pool.retain(blocks[4:], ("quarantine", 1))
    pool.alloc(1, ("transfer", 7), Medium.DRAM)
    pool.alloc(2, ("swap", 0), Medium.DRAM)
    hbm, dram = count_blocks(pool)
    assert nonzero(hbm) == {"both": 2, "transfer": 2, "quarantine": 2, "free": 14}
    assert nonzero(dram) == {"swap": 2, "transfer": 1, "free": 7}


@pytest.mark.parametrize("gap_ns", [1, 1000, 10**9])
def test_at_most_max_points_are_kept_and_they_span_the_run_evenly(gap_ns):
    occupancy = Occupancy("a", make_pool(), max_points=100)
    for step in range(10_000):
        occupancy.offer(step * gap_ns)
    samples = occupancy.samples(10_000 * gap_ns)
    times = np.array([sample.time_s for sample in samples])
    assert 40 <= len(samples) <= 101
    assert times[0] == 0 and times[-1] == pytest.approx(10_000 * gap_ns / 1e9)
    assert (np.diff(times) >= 0).all() and np.diff(times).max() <= times[-1] / 25


def test_the_first_state_of_a_bucket_is_kept_and_the_last_state_of_the_run():
    pool = make_pool()
    occupancy = Occupancy("a", pool, max_points=2)
    for now in (0, 1):
        occupancy.offer(now)
    pool.alloc(5, ("request", "a", 0))
    occupancy.offer(100)
    pool.alloc(5, ("request", "b", 0))
    occupancy.offer(101)
    assert [(s.time_s, s.hbm["request"]) for s in occupancy.samples(102)] == [(0, 0), (1e-7, 5), (1.02e-7, 10)]


def test_fewer_than_two_points_are_refused():
    with pytest.raises(ValueError, match="max_points=1: expected an integer >= 2"):
        Occupancy("a", make_pool(), max_points=1)


def simulate(*words):
    return LocalCluster(load_config([*SMALL, *words])).run_once()


def assert_sums(samples, num_blocks, num_dram_blocks):
    for sample in samples:
        assert set(sample.hbm) == set(sample.dram) == set(KINDS)
        assert min(*sample.hbm.values(), *sample.dram.values()) >= 0
        assert (sum(sample.hbm.values()), sum(sample.dram.values())) == (num_blocks, num_dram_blocks)


@pytest.mark.parametrize("num_dram_blocks", [0, 60])
@pytest.mark.parametrize("index", ["none", "radix"])
def test_a_runs_counts_add_up_to_the_pool_at_every_sample(num_dram_blocks, index):
    words = ["kvcache.num_hbm_blocks=160", f"kvcache.num_dram_blocks={num_dram_blocks}", f"index={index}"]
    samples = simulate(*words, "cluster=colocated_2").occupancy
    assert {sample.instance for sample in samples} == {"colocated-0", "colocated-1"}
    assert_sums(samples, 160, num_dram_blocks)
    assert any(s.hbm["request"] + s.hbm["both"] for s in samples)
    assert any(s.hbm["index"] for s in samples) == (index == "radix")
    assert any(s.dram["index"] for s in samples) == (index == "radix" and num_dram_blocks > 0)


def test_pressure_shows_as_cached_blocks_that_go_away():
    result = simulate("kvcache.num_hbm_blocks=160")
    cached = np.array([s.hbm["index"] + s.hbm["both"] for s in result.occupancy])
    assert result.report["instances"][0]["num_evicted_blocks"] > 0 and (np.diff(cached) < 0).any()
    roomy = simulate("kvcache.num_hbm_blocks=4000")
    cached = np.array([s.hbm["index"] + s.hbm["both"] for s in roomy.occupancy])
    assert roomy.report["instances"][0]["num_evicted_blocks"] == 0 and (np.diff(cached) >= 0).all()


def test_macro_steps_end_in_the_same_occupancy_with_fewer_samples():
    words = ["workload.ignore_eos=true", "kvcache.num_hbm_blocks=160"]
    macro, single = (simulate(*words, f"macro_steps={on}").occupancy for on in ("true", "false"))
    assert macro[-1] == single[-1] and len(macro) < len(single)


def test_what_is_written_is_what_is_loaded(tmp_path):
    LocalCluster(load_config(SMALL)).run(tmp_path)
    samples = load_occupancy(tmp_path)
    line = json.loads((tmp_path / "occupancy.jsonl").read_text().splitlines()[0])
    assert set(line) == {"instance", "time_s", "hbm", "dram"} and samples[0].hbm == line["hbm"]
    assert samples == simulate().occupancy


def test_a_panel_is_drawn_for_each_instance_and_each_tier_that_has_blocks():
    one = simulate("kvcache.num_hbm_blocks=160").occupancy
    two = simulate("kvcache.num_dram_blocks=60", "cluster=colocated_2").occupancy
    assert len(draw_occupancy({"one": one}).axes) == 1
    titles = [axes.get_title() for axes in draw_occupancy({"one": one, "two": two}).axes]
    assert len(titles) == 6 and titles[-1] == "two: colocated-1, DRAM"
    with pytest.raises(ValueError, match="no samples"):
        draw_occupancy({"empty": []})
