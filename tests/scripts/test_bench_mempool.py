"""The benchmark measures what it says: every prompt is cached as far as its row claims, and the oracle is exact."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from memserve.kvcache import RadixIndex

Script = Callable[[str], ModuleType]


def test_a_prompt_is_cached_as_far_as_its_row_says(script: Script) -> None:
    figures = script("pool_figures")
    prompts, index = figures.Prompts(0), RadixIndex(16, np.ones(512, dtype=np.int32))
    cached = figures.filled(index, 512, 256, prompts)
    assert index.num_blocks == 512
    for percent, num_blocks in ((0, 0), (50, 128), (90, 230), (100, 256)):
        assert index.peek(prompts.beginning_with(cached[1], percent)).num_tokens == num_blocks * 16


def brute_force_lru(paths: list[list[int]], num_blocks: int) -> int:
    """LRU in which only a block that no cached block continues may go, looked up anew each time."""
    used: dict[int, int] = {}
    before = {b: a for path in paths for a, b in zip([-1, *path[:-1]], path, strict=True)}
    num_found = 0
    for now, path in enumerate(paths):
        found = next((i for i, block in enumerate(path) if block not in used), len(path))
        num_found += found
        used |= dict.fromkeys(path[:found], now)
        while len(used) + len(path) - found > num_blocks:
            leaves = set(used) - {before[block] for block in used}
            del used[min(leaves - set(path), key=lambda block: used[block])]
        used |= dict.fromkeys(path, now)
    return num_found


def test_the_pool_finds_exactly_what_the_oracle_and_brute_force_find(script: Script) -> None:
    replay = script("trace_replay")
    trace = replay.synthetic_trace(150, seed=3)
    largest = max(len(path) for path in trace.paths)
    for num_blocks in (largest, trace.num_unique_blocks // 3 + largest, trace.num_unique_blocks):
        expected = brute_force_lru([list(path) for path in trace.paths], num_blocks)
        assert replay.lru_oracle(trace.paths, num_blocks) == expected
        assert replay.replay(trace, num_blocks)[1] == expected
    assert expected > 0


def test_an_id_stands_for_two_blocks_of_its_own(script: Script) -> None:
    trace = script("trace_replay")._trace("t", [[0, 7], [0, 8], [7]])
    assert trace.prompts[0].tolist() == [*range(32), *range(224, 256)]
    assert trace.paths == [[0, 1, 2, 3], [0, 1, 4, 5], [6, 7]]  # the same id after another prefix is another block
    assert trace.num_unique_blocks == 8 and trace.num_blocks == 10


def test_it_writes_every_figure_beside_its_goal_and_the_papers(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, out = script("bench_mempool"), tmp_path / "bench.json"
    monkeypatch.setattr(bench, "MOONCAKE", tmp_path / "absent.jsonl")
    bench.main(["--sizes", "512", "--repeats", "1", "--requests", "40", "--out", str(out)])
    figures = json.loads(out.read_text(encoding="utf-8"))["figures"]
    assert list(dict.fromkeys(f["part"] for f in figures)) == list(bench.PARTS)
    assert all(f["value"] > 0 and f["reached"] in (True, False, None) for f in figures)
    paper = [f for f in figures if f["paper"]]
    assert paper and all(f["ours_over_paper"] == f["value"] / f["paper"] for f in paper)
    assert all(f["value"] == f["goal"] for f in figures if f["what"].endswith("hit ratio"))
    assert "replay: synthetic conversations" in capsys.readouterr().out


def test_a_trace_of_the_users_own_is_read(script: Script, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"hash_ids": [1, 2]}\n{"hash_ids": [1, 3]}\n{"hash_ids": [4]}\n', encoding="utf-8")
    assert len(script("trace_replay").load_trace(path, 2).prompts) == 2


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--parts", "speed"], "--parts=speed: expected of index"),
        (["--sizes", "10"], "--sizes=10: expected an integer >= 256"),
        (["--sizes", "many"], "--sizes: many: expected integers"),
        (["--repeats", "0"], "--repeats=0"),
        (["--requests", "0"], "--requests=0"),
    ],
)
def test_options_out_of_range_are_named(
    script: Script, words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script("bench_mempool").main(words)
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("line", ["{", "[1]", '{"input_length": 3}', '{"hash_ids": []}', '{"hash_ids": [-1]}'])
def test_a_trace_s_line_that_is_no_request_is_named(script: Script, tmp_path: Path, line: str) -> None:
    (tmp_path / "trace.jsonl").write_text(f'{{"hash_ids": [1]}}\n{line}\n')
    with pytest.raises(SystemExit, match="trace.jsonl:2: .*expected"):
        script("bench_mempool").main(["--parts", "replay", "--trace", str(tmp_path / "trace.jsonl")])


def test_an_absent_or_empty_trace_is_an_error(script: Script, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    for name in ("empty.jsonl", "absent.jsonl"):
        with pytest.raises(SystemExit, match=name):
            script("bench_mempool").main(["--parts", "replay", "--trace", str(tmp_path / name)])
