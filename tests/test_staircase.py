"""The paper's four designs move exactly what each should move: prefill computed, P -> D and D -> P, in tokens."""

import pytest

from memserve import LocalCluster, load_config

NUM_TURNS, NEW, ANSWER = 3, 100, 40
COMMON = [
    "exec=simulated",
    "cluster=1p1d",
    "workload=synthetic",
    "workload.num_sessions=1",
    f"workload.num_turns={NUM_TURNS}",
    f"workload.prompt_tokens={NEW}",
    f"workload.turn_tokens={NEW}",
    f"workload.max_output_tokens={ANSWER}",
    "workload.think_time_s=10",
]


def moved(*words):
    report = LocalCluster(load_config([*COMMON, *words])).run()
    assert report["num_finished"] == NUM_TURNS and report["quarantined_blocks"] == 0
    ways = report["transfers"]
    return report["tokens"]["computed"], ways["p_to_d"]["tokens"], ways["d_to_p"]["tokens"]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("pd_basic", (720, 720, 0)),
        ("pd_caching_1", (380, 720, 0)),
        ("pd_caching_2", (380, 302, 0)),
        ("pd_caching_3", (302, 302, 117)),
    ],
)
@pytest.mark.parametrize("granularity", ["by_layer", "by_request", "packed"])
def test_the_staircase_in_tokens_with_blocks_of_one_token(mode, expected, granularity):
    assert moved(f"mode={mode}", "kvcache.block_size=1", f"granularity={granularity}") == expected


def by_formula(mode, block_size):
    """Each side holds whole blocks; the KV of an answer's last token never exists."""
    computed = p_to_d = d_to_p = 0
    held_p = held_d = 0
    for turn in range(NUM_TURNS):
        prompt = NEW + turn * (NEW + ANSWER)
        full_prompt, full_end = (n // block_size * block_size for n in (prompt, prompt + ANSWER - 1))
        computed += prompt - held_p
        p_to_d += prompt - held_d
        held_p = full_prompt if mode != "pd_basic" else 0
        held_d = full_end if mode in ("pd_caching_2", "pd_caching_3") else 0
        if mode == "pd_caching_3":
            d_to_p += full_end - held_p
            held_p = full_end
    return computed, p_to_d, d_to_p


@pytest.mark.parametrize("mode", ["pd_basic", "pd_caching_1", "pd_caching_2", "pd_caching_3"])
@pytest.mark.parametrize("block_size", [1, 16, 32, 48])
def test_increments_are_whole_blocks_of_the_receiver(mode, block_size):
    assert moved(f"mode={mode}", f"kvcache.block_size={block_size}") == by_formula(mode, block_size)


@pytest.mark.parametrize(
    ("granularity", "layout", "calls_a_block"),
    [("by_layer", "discrete", 4), ("by_request", "discrete", 4), ("by_request_agg", "aggregated", 1)],
)
def test_network_calls_are_the_paper_s(granularity, layout, calls_a_block):
    """HashRunner's cache has 2 layers: 2L = 4 calls a block unless blocks are aggregated."""
    words = ["mode=pd_basic", f"granularity={granularity}", f"layout={layout}", "tokens=hash"]
    report = LocalCluster(load_config([*COMMON, *words])).run()
    num_blocks = sum(-(-(NEW + turn * (NEW + ANSWER)) // 16) for turn in range(NUM_TURNS))
    assert report["transfers"]["p_to_d"]["calls"] == calls_a_block * num_blocks
    assert report["transfers"]["p_to_d"]["seconds"] > 0
