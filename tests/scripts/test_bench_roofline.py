"""Steps that were measured stand beside a roofline of this machine and of a data sheet, and of no other file."""

import msgspec
import pytest

from memserve.sched.cost_model.fitted import load_cost_file


def test_it_prints_errors_beside_the_operators_and_the_words_of_its_shares(script, costs, capsys, monkeypatch):
    bench = script("bench_roofline")
    monkeypatch.setattr(bench, "measure_machine", lambda: script("roofline").Machine(1e11, 1e10))
    for gpu in ("measured", "h100"):
        bench.main(["--costs", costs, "--gpu", gpu])
        shown = capsys.readouterr().out
        assert "one prompt" in shown and "operator" in shown and f"({gpu})" in shown
        assert "cost_model.compute_share=" in shown and "cost_model.step_s=" in shown


@pytest.mark.parametrize(
    ("gpu", "changes", "named"),
    [
        ("abacus", {}, "cost_model/gpu/abacus"),
        ("measured", {"machine": "abacus"}, "machine='abacus'"),
        ("measured", {"tensor_parallel": 2}, "--gpu measured: expected a file of one rank"),
        ("h100", {"shape": {}}, "names no model's sizes"),
    ],
)
def test_other_machines_and_files_are_refused_by_name(script, costs, gpu, changes, named, tmp_path):
    file = load_cost_file(costs)
    path = tmp_path / "other.json"
    path.write_bytes(
        msgspec.json.encode(msgspec.structs.replace(file, subject=msgspec.structs.replace(file.subject, **changes)))
    )
    with pytest.raises(SystemExit, match=named):
        script("bench_roofline").main(["--costs", str(path), "--gpu", gpu])
