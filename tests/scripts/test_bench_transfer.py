"""The benchmark moves what it says, and writes every figure beside what it is compared with."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(autouse=True)
def scripts_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_it_writes_every_figure_beside_what_it_is_compared_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench, out = script("bench_transfer"), tmp_path / "bench.json"
    words = ["--megabytes", "48", "--sizes", "16384,1048576", "--layers", "1", "--channels", "1,2", "--repeats", "1"]
    bench.main([*words, "--out", str(out)])
    written = json.loads(out.read_text(encoding="utf-8"))
    figures = written["figures"]
    assert list(dict.fromkeys(f["part"] for f in figures)) == list(bench.PARTS) and written["layers"] == 1
    assert all(f["gb_per_s"] > 0 and f["us_per_call"] > 0 and f["reached"] in (True, False, None) for f in figures)
    assert all((f["ratio"] is None) == (not f["beside"]) for f in figures)
    num_bytes = {f["num_bytes"] for f in figures if f["part"] in ("granularity", "fig11", "device")}
    assert num_bytes == {2048 * 2 * 40 * 128 * 2}, "2048 tokens, keys and values, 40 heads of 128 in float16, one layer"
    calls = {f["what"]: f["num_calls"] for f in figures}
    ways = {"ByLayer, aggregated": 256, "ByRequestAgg, aggregated": 128, "Packed, discrete": 1}
    assert {way: calls[f"gloo, {way}"] for way in ways} == ways
    assert calls["discrete, 2 channels"] == 2 * calls["aggregated, 2 channels"] == 256
    assert "2048 tokens of 1 of 40 layers" in capsys.readouterr().out


def test_as_many_layers_are_taken_as_have_room_to_scatter() -> None:
    bench = script("bench_transfer")
    assert [bench.layers_that_fit(n << 20) for n in (8, 512, 2560, 10_000)] == [1, 10, 40, 40]


def test_goals_are_of_the_ratio_or_of_the_rate() -> None:
    figure = script("transfer_figures").TransferFigure
    assert figure("p", "w", 2 * 10**9, 4, 1.0).gb_per_s == 2.0 and figure("p", "w", 8, 4, 1.0).us_per_call == 250_000
    assert figure("p", "w", 8, 1, 2.0, "x", 1.0, goal=0.5).reached is True
    assert figure("p", "w", 8, 1, 2.0, "x", 1.0, goal=0.6).reached is False
    assert figure("p", "w", 10**9, 1, 0.5, goal_gb_per_s=2.5).reached is False
    assert figure("p", "w", 8, 1, 2.0).reached is None and figure("p", "w", 8, 1, 2.0).ratio is None


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--device", "cuda"], "--device=cuda: expected --parts device"),
        (["--parts", "speed"], "--parts=speed: expected of sizes"),
        (["--sizes", "1000"], "--sizes=1000: expected multiples of 16384"),
        (["--channels", "3"], "--channels=3: expected of 1, 2, 4, 8, 16"),
        (["--repeats", "0"], "--repeats=0: expected an integer >= 1"),
        (["--megabytes", "1"], "--megabytes=1: expected an integer >= 8"),
    ],
)
def test_options_out_of_range_are_named(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script("bench_transfer").main(words)
    assert named in capsys.readouterr().err


def test_a_request_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(SystemExit, match="2 layers: 128 blocks do not fit into 8388608 bytes"):
        script("bench_transfer").main(["--megabytes", "8", "--layers", "2", "--parts", "fig11"])
