import json
import re

import pytest

from memserve import LocalCluster, load_config

SIMULATED = ["exec=simulated", "workload.num_sessions=4", "workload.max_turns=3", "workload.max_output_tokens=20"]


@pytest.fixture
def report(script):
    return script("report")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Two finished runs."""
    root = tmp_path_factory.mktemp("outputs")
    LocalCluster(load_config([*SIMULATED, "cluster=1p1d", "mode=pd_caching_3"])).run(root / "a" / "pd")
    LocalCluster(load_config([*SIMULATED, "kvcache.block_size=32"])).run(root / "b" / "pd")
    return [root / "a" / "pd", root / "b" / "pd"]


def test_the_page_stands_alone_and_has_every_run_and_request(report, outputs, tmp_path, capsys):
    out = tmp_path / "page.html"
    report.main([*map(str, outputs), "--out", str(out)])
    page = out.read_text(encoding="utf-8")
    assert capsys.readouterr().out == f"written to {out}\n"
    assert {"a/pd", "b/pd"} <= set(re.findall(r"<h2>(.*?)</h2>", page))
    assert all(source.startswith("data:image/") for source in re.findall(r'src="([^"]*)"', page))
    assert "<link" not in page and "import(" not in page
    for directory in outputs:
        for line in (directory / "requests.jsonl").read_text().splitlines():
            assert f">{json.loads(line)['request_id']}</td>" in page


def test_the_options_that_differ_are_named_with_both_values(report, outputs, tmp_path):
    runs = {name: report.load_run(path) for name, path in report.named(outputs).items()}
    found = report.differences(runs)
    assert found["kvcache.block_size"] == ["16", "32"] and found["mode._target_"][0].endswith('PDCaching3"')
    assert "seed" not in found


def test_one_run_has_nothing_to_differ_from(report, outputs):
    report.main([str(outputs[0])])
    assert "option that differs" not in (outputs[0] / "report.html").read_text()


def test_a_trace_is_written_into_every_run(report, outputs, tmp_path):
    report.main([*map(str, outputs), "--out", str(tmp_path / "page.html"), "--trace"])
    assert all(json.loads((directory / "trace.json").read_text())["traceEvents"] for directory in outputs)


@pytest.mark.parametrize("name", ["activity.jsonl", "report.json"])
def test_a_directory_that_is_no_finished_runs_is_refused_by_name(report, outputs, tmp_path, name):
    for file in outputs[0].iterdir():
        if file.name != name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(SystemExit, match=f"expected the output directory of a finished run, it has no {name}"):
        report.main([str(tmp_path)])


@pytest.mark.parametrize("name", ["env.json", "report.json", "requests.jsonl", "occupancy.jsonl", "activity.jsonl"])
def test_a_file_that_was_cut_off_is_named(report, outputs, tmp_path, name):
    for file in outputs[0].iterdir():
        (tmp_path / file.name).write_bytes(b"{" if file.name == name else file.read_bytes())
    with pytest.raises(SystemExit, match=rf"{re.escape(name)}: expected what a run wrote"):
        report.main([str(tmp_path)])


def test_a_directory_given_twice_is_refused(report, outputs):
    with pytest.raises(SystemExit, match="expected each directory once"):
        report.main([str(outputs[0]), str(outputs[0])])


def test_what_a_client_named_is_shown_and_not_run(report, outputs, tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    for file in outputs[1].iterdir():
        text = file.read_bytes()
        if file.name == "requests.jsonl":
            lines = [json.loads(line) | {"request_id": "<script>alert(1)</script>"} for line in text.splitlines()]
            text = "".join(json.dumps(line) + "\n" for line in lines).encode()
        (directory / file.name).write_bytes(text)
    report.main([str(directory)])
    page = (directory / "report.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page


def test_of_several_runs_those_that_failed_are_named_and_left_out(report, outputs, tmp_path, capsys):
    failed, out = tmp_path / "failed", tmp_path / "page.html"
    failed.mkdir()
    (failed / "printed.log").write_text("error: no room")
    report.main([str(outputs[0]), str(failed), str(outputs[1]), "--out", str(out)])
    assert capsys.readouterr().err.startswith(f"left out: {failed}: expected the output directory of a finished run")
    assert re.findall(r"<h2>(\w/pd)</h2>", out.read_text(encoding="utf-8")) == ["a/pd", "b/pd"]
    report.main([str(failed), str(outputs[0])])
    assert (
        f"written to {outputs[0] / 'report.html'}" in capsys.readouterr().out and not (failed / "report.html").exists()
    )
    with pytest.raises(SystemExit, match="expected at least one of a finished run"):
        report.main([str(failed), str(tmp_path), "--out", str(out)])
