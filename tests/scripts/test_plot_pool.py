"""The script draws what runs left, and ends with one line where there is nothing to draw."""

import subprocess
import sys

import pytest
from child_process import ROOT, own_environment

from memserve import LocalCluster, load_config

SMALL = ["exec=simulated", "workload.num_sessions=6", "workload.max_turns=3", "workload.max_output_tokens=40"]


def test_it_writes_a_picture_of_each_kind_without_a_display(script, tmp_path):
    LocalCluster(load_config(SMALL)).run(tmp_path)
    own = own_environment()
    own.pop("DISPLAY", None)
    subprocess.run([sys.executable, ROOT / "scripts" / "plot_pool.py", tmp_path], check=True, env=own)
    assert (tmp_path / "pool.png").read_bytes().startswith(b"\x89PNG")
    script("plot_pool").main([str(tmp_path), str(tmp_path), "--out", str(tmp_path / "two.svg")])
    assert "<svg" in (tmp_path / "two.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(("words", "named"), [([], "occupancy.jsonl"), (["--out", "pool.txt"], "--out pool.txt")])
def test_it_ends_with_one_line_where_there_is_nothing_to_draw(script, tmp_path, words, named):
    with pytest.raises(SystemExit) as ended:
        script("plot_pool").main([str(tmp_path), *words])
    assert isinstance(ended.value.code, str), "python prints it and ends with status 1"
    assert ended.value.code.startswith("error: ") and named in ended.value.code and "\n" not in ended.value.code


@pytest.mark.parametrize("line", ['{"instance": ', '{"nothing": 1}'])
def test_a_file_that_no_run_wrote_is_named(script, tmp_path, line):
    (tmp_path / "occupancy.jsonl").write_text(line)
    with pytest.raises(SystemExit, match="occupancy.jsonl: expected what a run wrote"):
        script("plot_pool").main([str(tmp_path)])
