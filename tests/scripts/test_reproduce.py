"""reproduce.py runs the paper's figures, puts the paper's values beside them, and refuses what there is not."""

import json

import pytest


@pytest.fixture
def reproduce(script):
    return script("reproduce")


@pytest.fixture
def figures(script):
    return script("paper_figures").FIGURES


def test_a_figure_is_printed_beside_the_paper_s_and_written(reproduce, tmp_path, capsys):
    short = ["workload.num_sessions=30", "--curves", "session_affinity,prompt_tree"]
    reproduce.main(["fig15", *short, "--points", "2", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "Fig. 15: policies on 3P1D: P99 TTFT" in said and "(126 ms)" in said and "(116 ms)" in said
    assert "P99 TTFT of prompt_tree against session_affinity at 2: " in said and "(paper: -8 %)" in said
    assert "at 3:" not in said
    assert "P99 TTFT: off by " in said and "over 2 values of the paper" in said
    values = json.loads((tmp_path / "fig15" / "values.json").read_text())
    assert values["P50 TTFT"]["prompt_tree"]["2"]["paper"] == 0.0426
    report = json.loads((tmp_path / "fig15" / "prompt_tree-2" / "report.json").read_text())
    assert values["P50 TTFT"]["prompt_tree"]["2"]["ours"] == report["ttft_s"]["p50"]
    assert (tmp_path / "fig15" / "figure.png").stat().st_size > 10_000


def test_what_a_figure_shows_of_a_share_is_relative_to_the_curve_s_first_point(reproduce, figures):
    figure = reproduce.narrowed(figures["fig13"], ["p1024"], [50])
    reports = reproduce.play(figure, [], None)
    (curve,), (shown,) = figure.curves, figure.shown
    assert set(reports) == {("p1024", 0), ("p1024", 50)}
    whole, half = (reports["p1024", percent]["ttft_s"]["p50"] for percent in (0, 50))
    assert reproduce.value_of(figure, reports, shown, curve, 50) == half / whole < 0.8
    assert reproduce.paper_value(shown, curve, 50) == 0.76
    assert reproduce.paper_value(shown, curve, 55) is None


def test_the_times_of_fig_11_are_the_paper_s(reproduce, figures):
    """The link is fitted to the two of them; that the bytes and calls are right is what makes it fit."""
    figure = reproduce.narrowed(figures["fig11"], ["by_request", "by_request_agg"], [2048])
    reports = reproduce.play(figure, [], None)
    for curve in figure.curves:
        ours = reproduce.value_of(figure, reports, figure.shown[0], curve, 2048)
        assert ours == pytest.approx(reproduce.paper_value(figure.shown[0], curve, 2048), rel=0.02)


def test_of_several_seeds_values_are_means_with_their_range(reproduce, tmp_path, capsys):
    words = ["--curves", "prompt_tree", "--points", "2", "workload.num_sessions=8"]
    reproduce.main(["fig15", *words, "--seeds", "2", "--out", str(tmp_path)])
    shown = json.loads((tmp_path / "fig15" / "values.json").read_text())["P50 TTFT"]["prompt_tree"]["2"]
    low, high = shown["range"]
    assert low < high and shown["ours"] == pytest.approx((low + high) / 2)
    assert " .. " in capsys.readouterr().out


def test_words_that_a_late_point_refuses_are_refused_before_the_first_one_runs(reproduce, capfd):
    with pytest.raises(SystemExit, match="a closed loop has no rate"):
        reproduce.main(["fig13", "--curves", "p512,p512_bs2", "--points", "50", "workload.rate=2"])
    assert "cluster time" not in capfd.readouterr().err


def test_how_far_a_figure_is_off_is_the_mean_over_what_the_paper_has(reproduce, figures):
    figure = reproduce.narrowed(figures["fig15"], ["prompt_tree", "cost_based"], [2, 3])
    reports = {(curve.name, point): {"ttft_s": {"p50": 0.0426, "p99": 0.0873}, "hit_ratio": 0.5}
               for curve in figure.curves for point in (2, 3)}  # fmt: skip
    said = list(reproduce.distances_of(figure, reports))
    assert said == [
        "P50 TTFT: off by 2 % on average over 2 values of the paper, by 4 % at most (prompt_tree at 3)",
        "P99 TTFT: off by 12 % on average over 2 values of the paper, by 25 % at most (prompt_tree at 2)",
    ]


def test_every_claim_is_of_a_curve_a_point_and_a_value_that_its_figure_has(figures):
    for figure in figures.values():
        names, labels = {curve.name for curve in figure.curves}, {shown.label for shown in figure.shown}
        for claim in figure.claims:
            assert {claim.curve, claim.base} <= names and claim.label in labels and claim.point in figure.points
        for curve in figure.curves:
            assert set(curve.paper) <= labels
            assert all(set(values) <= set(figure.points) for values in curve.paper.values())


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["fig9"], "fig9: expected of fig8_sharegpt"),
        (["fig15", "--curves", "tree"], "--curves tree: expected of round_robin"),
        (["fig15", "--points", "two"], None),
        (["fig15", "nonsense=1"], "nonsense"),
        (["fig13", "--points", "120"], "120 per cent of a prompt: expected 0 to 100"),
        (
            ["fig13", "--curves", "p512_bs2", "workload.rate=2"],
            "rate=2.*: a closed loop has no rate; expected rate=null",
        ),
    ],
)
def test_what_is_no_figure_curve_or_word_is_named(reproduce, words, named):
    with pytest.raises(SystemExit, match=named):
        reproduce.main(words)


def test_without_a_figure_those_there_are_are_named(reproduce, figures, capsys):
    reproduce.main([])
    named = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert named == list(figures)
