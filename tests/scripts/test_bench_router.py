"""The benchmark fills as many blocks as it says, and every policy gets a row for each number of instances."""

import json

import numpy as np
import pytest

from memserve.sched.prompt_tree import Optimistic


def test_the_tree_is_as_full_as_its_title_says_and_seen_prompts_are_found(script):
    bench = script("bench_router")
    prompts, tree = bench.Prompts(256, np.random.default_rng(0)), Optimistic(4, 16, max_blocks=1000)
    seen = bench.fill(tree, 4, 400, prompts)
    assert 400 <= tree.num_blocks < 400 + 16
    found = tree.match(seen[-1].tobytes(), len(seen))
    assert found.max() == 256 and found.argmax() == len(seen) % 4


def test_every_policy_has_a_row_for_each_number_of_instances(script, tmp_path, capsys):
    bench = script("bench_router")
    out = tmp_path / "router.json"
    bench.main(["--instances", "2,4", "--blocks", "300", "--tokens", "128", "--repeats", "5", "--json", str(out)])
    recorded = json.loads(out.read_text())
    assert set(recorded["results"]) == {"2", "4"} and set(recorded["results"]["4"]) == set(bench.POLICIES)
    assert all(figures["median_us"] > 0 for row in recorded["results"].values() for figures in row.values())
    assert "prompt_tree" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--instances", "4,0"], "--instances: 4,0: expected integers >= 1"),
        (["--blocks", "0"], "--blocks: 0: expected an integer >= 1"),
        (["--tokens", "15"], "--tokens: 15: expected an integer >= 16"),
        (["--repeats", "few"], "--repeats: few: expected an integer >= 1"),
    ],
)
def test_options_out_of_range_are_named(script, capsys, words, named):
    """A prompt of less than a block would never fill the tree."""
    with pytest.raises(SystemExit):
        script("bench_router").main(words)
    assert named in capsys.readouterr().err
