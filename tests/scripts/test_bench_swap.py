"""The benchmark moves what it says: nothing where all is in HBM, else a prompt down and one up for each return."""

import json

import pytest

CONFIG = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 400, "rms_norm_eps": 1e-5,
}  # fmt: skip


def test_every_way_has_its_figures_and_moves_what_it_must(script, tmp_path, capsys):
    bench, out = script("bench_swap"), tmp_path / "swap.json"
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    words = ["--prompt-len", "256", "--prompts", "6", "--running-len", "8", "--block-size", "16", "--repeats", "1"]
    bench.main(["--model", f"random:{tmp_path}", *words, "--out", str(out)])
    figures = {figure["way"]: figure for figure in json.loads(out.read_text())["figures"]}
    assert set(figures) == set(bench.WAYS)
    assert figures.pop("in HBM")["num_swapped"] == 0
    for figure in figures.values():
        assert 2 * 14 <= figure["num_swapped"] <= 2 * 18, "16 blocks a prompt, up and down"
    assert all(figure["gap_p99_s"] >= figure["gap_p50_s"] > 0 and figure["rate"] > 0 for figure in figures.values())
    assert "in one piece" in capsys.readouterr().out


def test_too_few_prompts_are_refused(script, capsys):
    with pytest.raises(SystemExit):
        script("bench_swap").parse(["--prompts", "2"])
    assert "--prompts=2: expected an integer >= 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "named"),
    [("/no/model", "no such file or directory"), ("random:DIR", "prompt of 512 tokens: the context of 400 tokens")],
)
def test_a_model_that_cannot_play_it_is_an_error_in_one_line(script, tmp_path, model, named):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(SystemExit, match=named):
        script("bench_swap").main(["--model", model.replace("DIR", str(tmp_path)), "--repeats", "1", "--prompts", "4"])


def test_requests_that_end_before_the_prompts_are_back_are_an_error_and_no_rate(script, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    words = ["--prompt-len", "16", "--prompts", "4", "--running-len", "8", "--block-size", "4", "--repeats", "1"]
    with pytest.raises(SystemExit, match="error: the requests that run ended, after 8 tokens"):
        script("bench_swap").main(["--model", f"random:{tmp_path}", *words])
