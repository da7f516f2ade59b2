"""The one command for a machine with a GPU has no mistake that waits for one: without it, its parts run dry."""

import os
import re
import shlex
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from child_process import needs_triton, own_environment

from memserve import load_config
from memserve.clock import monotonic_ns

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"
INTERPRETER = shlex.quote(sys.executable)


def gpu_check(page: Path, *words: str, python: str = sys.executable) -> tuple[int, str]:
    """(status, everything printed)"""
    own = own_environment(ROOT / "tests", PYTHON=python, PAGE=str(page))
    command = ["bash", str(SCRIPT), *words]
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=False, timeout=400)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def mended(tmp_path: Path) -> str:
    """This interpreter, whose scripts have Triton's as the other tests do: kernels take them half the time."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$1" in scripts/*) set -- -m fast_interpreter "$@" ;; esac\nexec {INTERPRETER} "$@"\n'
    )
    python.chmod(0o755)
    return str(python)


@needs_triton
@pytest.mark.timeout(400)  # interpreted kernels, beside whatever else the machine does
def test_the_benchmarks_and_the_tuning_of_kernels_run_dry(tmp_path: Path, mended: str) -> None:
    status, printed = gpu_check(tmp_path / "page.md", "--dry", "kernels", "decode", "tune", python=mended)
    assert status == 0, printed
    page = (tmp_path / "page.md").read_text()
    lines = re.findall(r"^\| (.+?) \| [\d.e+-]+ \| [\d.e+-]+ \| (?:GB/s|TFLOP/s|ms) \|", page, flags=re.MULTILINE)
    assert [line.split(",")[0] for line in lines] == [
        "the best of reading", "norm", "norm with residual", "swiglu", "rope and cache write", "block copy",
        "decode attention",
        "norm", "norm", "output and sum", "output and sum", "norm", "norm", "down and sum", "down and sum", "prefill",
        *["decode step"] * 5,
    ]  # fmt: skip
    assert page.count("Goal: ") == page.count("Status 0") == 4


def test_costs_are_profiled_and_held_against_a_roofline_dry(tmp_path: Path) -> None:
    status, printed = gpu_check(tmp_path / "page.md", "--dry", "costs")
    assert status == 0, printed
    page = (tmp_path / "page.md").read_text()
    assert page.count("Status 0") == 2 and "cost_model.compute_share=" in page
    assert (tmp_path / "page-costs.json").exists()


def test_a_part_that_fails_is_named_and_stops_no_other(tmp_path: Path) -> None:
    status, printed = gpu_check(tmp_path / "page.md", "--dry", "kernels", "transfer", "serve", python="false")
    assert status == 1
    assert re.findall(r"^failed: (\w+)", printed, flags=re.MULTILINE) == ["kernels", "transfer", "serve", "serve"]
    assert printed.count("Status 1") == 4


def test_a_process_that_outlives_its_part_is_not_waited_for(tmp_path: Path) -> None:
    """In a session of its own, as a rank of torchrun's is: it holds what its part wrote to."""
    python = tmp_path / "python"
    left = "setsid sleep 60 & echo $!; exit 3"
    python.write_text(f'#!/bin/sh\ncase "$1" in scripts/*) {left} ;; *) exec {INTERPRETER} "$@" ;; esac\n')
    python.chmod(0o755)
    began_ns = monotonic_ns()
    status, printed = gpu_check(tmp_path / "page.md", "--dry", "kernels", python=str(python))
    assert status == 1 and "Status 3" in printed and monotonic_ns() - began_ns < 40e9
    left_pid = re.search(r"^(\d+)$", (tmp_path / "page.md").read_text(), flags=re.MULTILINE)
    assert left_pid is not None, "what the part wrote is in the page"
    os.kill(int(left_pid[1]), signal.SIGKILL)


def test_packages_that_the_interpreter_lacks_are_named_before_anything_runs(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {INTERPRETER} -I -S "$@"\n')
    bare.chmod(0o755)
    status, printed = gpu_check(tmp_path / "page.md", "--dry", "kernels", python=str(bare))
    assert status == 1 and "has no torch triton numpy" in printed and not (tmp_path / "page.md").exists()


def test_wheels_that_are_brought_along_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an interpreter that says where it looks instead of running a part."""
    wheels, told = tmp_path / "wheels", tmp_path / "python"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "carried_along-1.0-py3-none-any.whl", "w") as wheel:
        info = "carried_along-1.0.dist-info"
        wheel.writestr("carried_along.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried-along\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    told.write_text(
        f'#!/bin/sh\ncase "$1" in scripts/*) ls "${{PYTHONPATH##*:}}" ;; *) exec {INTERPRETER} "$@" ;; esac\n'
    )
    told.chmod(0o755)
    monkeypatch.setenv("WHEELS", str(wheels))
    status, printed = gpu_check(tmp_path / "page.md", "--dry", "kernels", python=str(told))
    assert status == 0 and "carried_along.py" in printed


def test_a_part_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    status, printed = gpu_check(tmp_path / "page.md", "--dry", "kernels", "speed", python="false")
    expected = "error: speed: expected of tests, clusters, kernels, decode, transfer, serve, tune, costs"
    assert status == 2 and expected in printed
    assert not (tmp_path / "page.md").exists(), "before anything runs"


def test_the_configurations_that_it_serves_compose() -> None:
    named = dict.fromkeys(("model", "workload"), "")
    for name in named:
        first = re.search(rf"\b{name}=\((.*?)\)", SCRIPT.read_text(), flags=re.DOTALL)
        assert first is not None
        named[name] = first[1]
    words = shlex.split(" ".join(named.values()))
    modes = ["cluster=1p1d", "mode=pd_caching_3", "granularity=by_request_agg", "layout=aggregated"]
    distributed = load_config(["exec=distributed", "transport=mapped", *modes, *words, "model.device=cuda"])
    assert distributed.model.attention == "triton" and distributed.model.random["head_dim"] == 128
    assert load_config(["cluster=colocated_2", *words, "model.device=cuda"]).step_time == "measured"


def test_the_parts_that_its_head_puts_into_one_command_end_within_ten_minutes() -> None:
    said = SCRIPT.read_text()
    head, body = said.split("set -uo pipefail", 1)
    limits = {}
    for part, commands in re.findall(r"^(serve|costs)\(\) \{(.+?)^\}", body, flags=re.MULTILINE | re.DOTALL):
        limits[part] = sum(map(int, re.findall(r'^    run ".+?" (\d+) ', commands, flags=re.MULTILINE)))
    for part, commands in re.findall(r"^    (\w+)\)\n(.+?);;", body, flags=re.MULTILINE | re.DOTALL):
        limits[part] = sum(map(int, re.findall(r'^        run (?:".+?"|\w+) (\d+) ', commands, flags=re.MULTILINE)))
    together = re.search(r"these end before: (.+?), in this order", head, flags=re.DOTALL)
    assert together is not None
    groups = [words.split() for words in re.findall(r"`(.+?)`", together[1])]
    assert sorted(part for group in groups for part in group) == sorted(limits)
    assert all(0 < sum(limits[part] for part in group) < 590 for group in groups), limits
