"""Steps that were measured stand beside a roofline of this machine and of a data sheet, and of no other file."""

import re

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from memserve import load_config
from memserve.cluster.make import make
from memserve.sched.cost_model.fit import MeasuredStep
from memserve.sched.cost_model.fitted import load_cost_file
from memserve.sched.cost_model.roofline import RooflineCostModel

SHARES = {"compute_share": 0.5, "attention_share": 0.25, "bandwidth_share": 0.5, "step_s": 0.0}


@pytest.fixture
def write(costs, tmp_path):
    """write(subject's changes, steps): the path of a cost file."""

    def write_file(changes, steps=None):
        file = load_cost_file(costs)
        beside = {} if steps is None else {"fitted": steps, "held_out": steps}
        path = tmp_path / "other.json"
        path.write_bytes(msgspec.json.encode(replace(file, subject=replace(file.subject, **changes), **beside)))
        return str(path)

    return write_file


def test_a_cpu_s_steps_stand_beside_its_own_rates(script, costs, capsys, monkeypatch):
    bench = script("bench_roofline")
    monkeypatch.setattr(bench, "measure_machine", lambda: script("roofline").Machine(1e11, 1e10))
    bench.main(["--costs", costs, "--gpu", "measured"])
    shown = capsys.readouterr().out
    assert "0.1 TFLOP/s, 10 GB/s" in shown and "one prompt" in shown and "cost_model.step_s=" in shown


def test_steps_of_half_a_sheet_s_rates_are_found_to_be_that(script, write, capsys):
    bench, gpu = script("bench_roofline"), {"machine": "NVIDIA H200", "dtype": "bfloat16"}
    subject = load_cost_file(write(gpu)).subject
    words = ["exec=simulated", "cost_model=roofline", "cost_model/gpu=h200"]
    truth = RooflineCostModel(make(load_config(words).cost_model["gpu"]), bench.shape_of_whole(subject), **SHARES)
    once = np.zeros(1, dtype=np.int64)
    pairs = [([x], [y]) for x in (0, 5_000) for y in (1, 40, 400_000)] + [([9_000] * n, [1] * n) for n in (2, 900)]
    steps = [MeasuredStep(x, y, float(truth.step_time_s(np.array(x), np.array(y), once)[0])) for x, y in pairs]
    bench.main(["--costs", write(gpu, steps)])
    shown = capsys.readouterr().out
    [row] = [re.split(r"\s*[|│]\s*", line)[1:-1] for line in shown.splitlines() if re.match(r"[|│] all", line)]
    assert row[1] == "8" and 0.25 <= float(row[3]) <= 0.51 and float(row[4]) < 3
    assert "989 TFLOP/s, 4800 GB/s" in shown


@pytest.mark.parametrize(
    ("gpu", "changes", "named"),
    [
        ("abacus", {"dtype": "bfloat16"}, "cost_model/gpu/abacus"),
        ("measured", {"machine": "abacus"}, "machine='abacus'"),
        ("measured", {"tensor_parallel": 2}, "--gpu measured: expected a file of one rank"),
        ("measured", {"dtype": "bfloat16"}, "--gpu measured with a file of bfloat16: expected one of float32"),
        ("h100", {}, "--gpu h100 with a file of float32: expected one of bfloat16 or float16"),
        ("h100", {"dtype": "float16", "shape": {}}, "names no model's sizes"),
        (None, {"machine": "NVIDIA H100 PCIe"}, "of NVIDIA H100 PCIe, of which configs/cost_model/gpu has no sheet"),
    ],
)
def test_other_machines_and_files_are_refused_by_name(script, write, gpu, changes, named):
    words = [] if gpu is None else ["--gpu", gpu]
    with pytest.raises(SystemExit, match=named):
        script("bench_roofline").main(["--costs", write(changes), *words])


def test_every_data_sheet_is_there_and_of_one_gpu(script):
    sheets = script("bench_roofline").SHEETS
    for word in sheets.values():
        load_config(["exec=simulated", "cost_model=roofline", f"cost_model/gpu={word}"])
    assert len(set(sheets.values())) == len(sheets)
