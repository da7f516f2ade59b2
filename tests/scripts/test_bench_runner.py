"""The benchmark compares engines that give the same answers, against a roofline that counts what no step can avoid."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from memserve.model.model_config import ModelConfig
from memserve.model.model_path import open_random_model

Script = Callable[[str], ModuleType]
CONFIG = ModelConfig("llama", 40, 8, 12, 2, 2, 1, 4, 64, tie_embeddings=True)
LAYER_WEIGHTS = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12)
HEAD_WEIGHTS = 40 * 8


def test_both_engines_generate_the_same_tokens(script: Script) -> None:
    opened = open_random_model(CONFIG, seed=1)
    options = script("bench_figures").Options([2], [], 16, 6, 4, "sdpa", False, 1, 0)
    bench = script("bench_figures").Bench(opened, options, lambda: script("roofline").Machine(1e11, 1e10))
    prompts = [np.arange(n, dtype=np.int32) % 40 for n in (9, 14)]
    steps, ours = bench._engine(32, 2).serve(prompts, 6)
    first_s, steps_s, theirs = script("hf_baseline").HFBaseline(CONFIG, opened.weights).generate(prompts, 6)
    assert ours.tolist() == theirs.tolist()
    assert first_s > 0
    assert len(steps_s) == len([step for step in steps if step.decode]) == 5
    assert steps[-1].seq_lens.tolist() == [14, 19]


def test_a_preloaded_prompt_computes_only_what_is_not_a_whole_block(script: Script) -> None:
    opened = open_random_model(CONFIG, seed=1)
    model = script("bench_figures").load_model(CONFIG, opened.weights, torch.float32, torch.device("cpu"))
    engine = script("step_bench").StepBench(model, 8, 4, "sdpa")
    prompt = np.arange(10, dtype=np.int32)
    engine.preload([prompt])
    assert [step.num_tokens for step in engine.serve([prompt], 3)[0]] == [2, 1, 1]
    engine.forget()
    assert [step.num_tokens for step in engine.serve([prompt], 3)[0]] == [10, 1, 1]


def test_the_roofline_counts_weights_kv_and_operations(script: Script) -> None:
    roofline = script("roofline")
    decode = roofline.decode_work(CONFIG, np.array([3, 5]))
    assert decode.num_bytes == 4 * (LAYER_WEIGHTS + HEAD_WEIGHTS + 2 * 2 * 1 * 4 * 8)
    assert decode.flops == 2 * 2 * (LAYER_WEIGHTS + HEAD_WEIGHTS) + 4 * 2 * 2 * 4 * 8
    prefill = roofline.prefill_work(CONFIG, 5, num_cached=2)
    assert prefill.flops == 2 * LAYER_WEIGHTS * 3 + 2 * HEAD_WEIGHTS + 4 * 2 * 2 * 4 * (3 + 4 + 5)
    machine = roofline.Machine(gemm_flops=1e3, read_bytes=1e12)
    assert machine.seconds(decode) == decode.flops / 1e3
    assert roofline.Machine(1e12, 1e3).seconds(decode) == decode.num_bytes / 1e3
    assert machine.mean_with(roofline.Machine(3e3, 3e12)) == roofline.Machine(2e3, 2e12)


def test_it_writes_a_share_of_the_roofline_for_every_figure(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench_runner, out = script("bench_runner"), tmp_path / "bench.json"
    machine = script("roofline").Machine(1e11, 1e10)
    monkeypatch.setattr(bench_runner, "measure_machine", lambda: machine)
    common = ["--shapes", "tiny", "--prompt-len", "16", "--new-tokens", "3", "--repeats", "1", "--out", str(out)]
    bench_runner.main([*common, "--batches", "1,2", "--prefill", "32"])
    figures = json.loads(out.read_text(encoding="utf-8"))["results"][0]["figures"]
    expected = [(engine, what) for engine in ("memserve", "hf") for what in WHAT]
    assert [(f["engine"], f["what"]) for f in figures] == expected
    assert all(f["share"] == f["tokens_per_s"] / f["roofline_tokens_per_s"] > 0 for f in figures)
    assert "decode, batch 2" in capsys.readouterr().out
    bench_runner.main([*common, "--batches", "1", "--prefill", "32", "--hits"])
    result = json.loads(out.read_text(encoding="utf-8"))["results"][0]
    assert [hit["num_cached"] for hit in result["hits"]] == [0, 256, 448]
    assert result["radix_over_none"] > 0


WHAT = ("decode, batch 1", "decode, batch 2", "prefill, 32 tokens")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--new-tokens", "1"], "--new-tokens=1: expected an integer >= 2"),
        (["--batches", "0"], "0: expected integers >= 1"),
        (["--repeats", "0"], "--repeats=0"),
        (["--threads", "0"], "--threads: 0: expected an integer >= 1"),
    ],
)
def test_options_out_of_range_are_named(
    script: Script, words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script("bench_runner").main(words)
    assert named in capsys.readouterr().err


def test_a_shape_that_is_none_is_named(script: Script) -> None:
    with pytest.raises(SystemExit, match="no-such-model"):
        script("bench_runner").main(["--shapes", "no-such-model"])
