"""The benchmark measures both ways between two processes, and counts the right choices rightly."""

import json
import math

import numpy as np
import pytest
import torch

from memserve.kvcache import CacheGeometry, DiscreteLayout
from memserve.sched.cost_model.transfer import TransferCost
from memserve.transfer.link import LinkModel

SMALL = ["--cases", "4", "--repeats", "2", "--max-context", "64", "--max-batch", "2", "--transports", "mapped"]


def test_it_says_how_often_each_policy_was_right_beside_what_repeats_agree_on(script, tmp_path, capsys, monkeypatch):
    out, bench = tmp_path / "fetch.json", script("bench_fetch")
    monkeypatch.setattr(bench, "REPEAT_S", 0.001)  # what is right is not this test's matter
    bench.main([*SMALL, "--json", str(out), "model=tiny", "model.num_threads=1"])
    written = json.loads(out.read_text(encoding="utf-8"))
    assert set(written["figures"]) == {"mapped, by_request", "mapped, packed"} and written["goal"] == 0.95
    for figures in written["figures"].values():
        assert figures["cases"] == 4 and set(figures["right"]) == {"cost", "always", "never", "repeat"}
        assert figures["right"]["always"] + figures["right"]["never"] == pytest.approx(1) or figures["far"] == 0
    assert "fetched, slower" in capsys.readouterr().out


def test_cases_near_break_even_are_counted_apart_and_noise_below_zero_is_slower_to_fetch(script):
    cases = script("fetch_cases")
    chose = np.array([True, True, False, False, True])
    fetch_s, compute_s = np.array([1.0, 1.05, 1.0, 2.0, 1.0]), np.array([2.0, 1.0, 3.0, 1.0, -0.1])
    verdict = cases.judge(chose, fetch_s, compute_s)
    assert verdict.far.tolist() == [True, False, True, True, True]
    assert verdict.right.tolist() == [True, False, False, True, False]
    assert verdict.share_right(far=True) == 0.5 and verdict.share_right(far=False) == 0.4
    assert [verdict.count(*pair) for pair in ((True, True), (True, False), (False, False), (False, True))] == [
        1,
        1,
        1,
        1,
    ]
    assert math.isnan(cases.judge(chose[:1], np.ones(1), np.ones(1)).share_right(far=True))


def test_drawn_prompts_hold_whole_blocks_fit_the_context_and_leave_a_token_to_compute(script):
    drawn = script("fetch_cases").draw_cases(50, 128, 3, 16, np.random.default_rng(0))
    assert [len(case) for case in drawn[:4]] == [1, 2, 3, 1]
    for choice in [choice for case in drawn for choice in case]:
        assert 0 <= choice.num_cached < choice.num_held < choice.num_tokens <= 128
        assert choice.num_cached % 16 == choice.num_held % 16 == 0


def test_a_wire_is_fitted_by_what_each_transfer_each_call_and_each_byte_take(script):
    cases, geometry = script("fetch_cases"), CacheGeometry(2, 16, 4, 8, torch.float32)

    class NoEnds:
        memory = bytes(100 * geometry.block_bytes)

        def sender(self, word):
            return 0, None

    wire = cases.Wire(NoEnds(), "gloo", "by_request", geometry, np.random.default_rng(0))
    counts, link = cases.block_counts(31), LinkModel(7e-5, 2.0, 5e-4)
    truth = TransferCost.of(link, cases.ByRequest(DiscreteLayout(), geometry), geometry.num_layers)
    found = wire.fit(counts, np.array([truth.fetch_time_s(n) for n in counts]))
    assert found.fetch_time_s(20) == pytest.approx(truth.fetch_time_s(20), rel=1e-6)
    assert found.link.message_latency_s == pytest.approx(5e-4, rel=1e-4)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--transports", "pigeon"], "--transports=pigeon: expected of mapped, gloo"),
        (["--repeats", "1"], "--repeats=1: expected an integer >= 2"),
        (["--max-batch", "1"], "--max-batch=1: expected an integer >= 2"),
    ],
)
def test_options_out_of_range_are_named(script, capsys, words, named):
    with pytest.raises(SystemExit):
        script("bench_fetch").main(words)
    assert named in capsys.readouterr().err


def test_a_context_that_the_model_does_not_have_is_an_error(script):
    with pytest.raises(SystemExit, match="--max-context=9000: the model's context has 8192 tokens"):
        script("bench_fetch").main(["--max-context", "9000", "model=tiny"])


def test_a_context_without_room_for_a_block_and_a_token_is_an_error(script):
    with pytest.raises(SystemExit, match="--max-context=64: expected more than kvcache.block_size=64"):
        script("bench_fetch").main(["--max-context", "64", "model=tiny", "kvcache.block_size=64"])
