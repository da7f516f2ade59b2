"""A sweep's points on a stand-in for run.py that does what its first line says: names, repetition, failure."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from cluster.test_clean_ends import wait_until
from forking import forking
from hydra import compose, initialize_config_dir
from hydra.core.utils import JobReturn, JobStatus
from source_tree import ROOT

from memserve import LocalCluster, load_config
from memserve.cluster.interruption import Interrupted
from memserve.cluster.result import NotWritten
from memserve.cluster.sweep import MAX_NAME_BYTES, SweepTable, directory_name, run_point
from memserve.compose import config_dir, resolve, to_yaml
from memserve.transfer.liveness import Watched

SIMULATED = ["exec=simulated", "workload=synthetic"]


def composed(words):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("run", overrides=list(words))


@pytest.fixture
def sweep(tmp_path):
    """Runs a point with a child that writes a report and the configuration, or exits with `status` before it does."""

    def point(words, status=0):
        script, config = tmp_path / "child.py", tmp_path / "expected.yaml"
        cfg = composed(words)
        if status == 0:
            config.write_text(to_yaml(resolve(cfg)), encoding="utf-8")
        script.write_text(
            "import pathlib, shutil, sys\n"
            "directory = pathlib.Path(sys.argv[-1].partition('=')[2].strip(\"'\"))\n"
            "print('printed', flush=True)\n"
            f"if {status}: sys.exit({status})\n"
            f"shutil.copy({str(config)!r}, directory / 'config.yaml')\n"
            "(directory / 'report.json').write_text('{}')\n"
        )
        return run_point(cfg, script, words, tmp_path / "sweep")

    return point


def end(sweep_dir, *statuses):
    """What Hydra does at the jobs' ends and the sweep's."""
    table = SweepTable()
    for status in statuses:
        table.on_job_end(None, JobReturn(status=JobStatus.COMPLETED, _return_value=status))
    table.on_multirun_end(SimpleNamespace(hydra=SimpleNamespace(sweep=SimpleNamespace(dir=str(sweep_dir)))))


def test_a_directorys_name_is_the_words_where_a_file_system_takes_them():
    assert directory_name(["b=2", "+a=1", "~c"]) == "+a=1,b=2,~c" and directory_name([]) == "defaults"


@pytest.mark.parametrize("words", [["a/b=c"], ["path=/a/b.jsonl"], ["a=[b,c]"], ["a='\u00e9'"], ["a=" + "x" * 300]])
def test_other_words_give_one_flat_bounded_name_that_a_hash_makes_their_own(words):
    name, other = directory_name(words), directory_name([words[0] + "/"])
    assert "/" not in name and name.isascii() and len(name) <= MAX_NAME_BYTES and name != other
    assert name == directory_name(words) and name.startswith(words[0][0])


def test_points_of_any_words_run_once_each_and_have_a_row_under_their_own_words(sweep, tmp_path, capsys):
    shared = [*SIMULATED, "workload/arrivals=gamma", "workload.num_turns=3", "workload.prompt_tokens=256",
              "workload.turn_tokens=64", "workload.max_output_tokens=32", "kvcache.num_hbm_blocks=2048",
              "kvcache.block_size=16", "sched.token_budget=2048", "transfer.deadline_s=60"]  # fmt: skip
    points = [[*shared, f"cluster.roles={roles}"] for roles in ("[colocated]", "[colocated,colocated]")]
    assert [sweep(words) for words in points] == [0, 0] == [sweep(words) for words in points]
    out = capsys.readouterr().out
    for name in (",".join(sorted(words)) for words in points):
        assert len(name) > MAX_NAME_BYTES and out.count(f"{name}: done\n") == out.count(f"{name}: done before\n") == 1
    end(tmp_path / "sweep", 0, 0)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(" cluster.roles=[")]
    assert len(rows) == 2 == len(list((tmp_path / "sweep").iterdir()))


def test_a_refused_point_leaves_its_reason_and_the_sweep_ends_with_status_1(sweep, tmp_path, capsys):
    refused = [*SIMULATED, "tokens=model"]
    assert sweep(SIMULATED) == 0
    assert sweep(refused, status=1) == 1
    directory = tmp_path / "sweep" / directory_name(refused)
    assert (directory / "printed.log").read_text().startswith("error: tokens=model contradicts exec=simulated")
    with pytest.raises(SystemExit, match="1"):
        end(tmp_path / "sweep", 0, 1)
    out = capsys.readouterr().out
    assert f"{','.join(sorted(refused))}: no report, see {directory / 'printed.log'}" in out.splitlines()


def test_a_sweep_of_failures_alone_prints_no_empty_table(sweep, tmp_path, capsys):
    sweep(SIMULATED, status=1)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="1"):
        end(tmp_path / "sweep", 1)
    (line,) = capsys.readouterr().out.splitlines()
    assert ": no report, see " in line


def test_a_failed_point_keeps_no_report_of_an_earlier_run(sweep, tmp_path, capsys):
    assert sweep(SIMULATED) == 0
    directory = tmp_path / "sweep" / directory_name(SIMULATED)
    (directory / "config.yaml").write_text("seed: 1 # of another revision\n")
    assert sweep(SIMULATED, status=3) == 3
    assert not (directory / "report.json").exists() and (directory / "printed.log").read_text() == "printed\n"
    assert json.loads((directory / "words.json").read_text()) == sorted(SIMULATED)
    assert "failed with status 3" in capsys.readouterr().out


def test_a_point_that_heeds_no_sigterm_is_killed_with_its_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr("memserve.cluster.sweep._HEED_S", 0.5)
    script, printed = tmp_path / "child.py", tmp_path / directory_name(SIMULATED) / "printed.log"
    script.write_text(
        "import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(os.getpid(), flush=True)\ntime.sleep(600)\n"
    )
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def interrupt():
        give_up_s = time.monotonic() + 60
        while not (printed.is_file() and printed.read_text()) and time.monotonic() < give_up_s:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(Interrupted):
            run_point(composed(SIMULATED), script, SIMULATED, tmp_path)
    finally:
        thread.join()
        for signum, handler in before.items():
            signal.signal(signum, handler)
    with pytest.raises(ProcessLookupError):
        os.kill(int(printed.read_text()), 0)


def play_point(words, script, sweep_dir):
    run_point(composed(words), script, words, sweep_dir)


@pytest.mark.parametrize("distributed", [False, True], ids=["alone", "under torchrun"])
def test_a_point_ends_with_a_sweep_that_is_killed(distributed, tmp_path):
    words = ["exec=distributed", "transport=gloo", "tokens=hash"] if distributed else SIMULATED
    script = tmp_path / "child.py"
    script.write_text(
        "import os, pathlib, time\n"
        "(pathlib.Path(__file__).parent / f'started-{os.getpid()}').touch()\ntime.sleep(100)\n"
    )

    def started():
        return [Watched(int(path.name.partition("-")[2])) for path in tmp_path.glob("started-*")]

    sweep = forking().Process(target=play_point, args=(words, script, tmp_path / "sweep"))
    sweep.start()
    try:
        wait_until(lambda: len(started()) == 1 + distributed, 60, lambda: "nobody has started")
        point = started()
    finally:
        sweep.kill()
        sweep.join()
    wait_until(lambda: all(process.is_gone for process in point), 30, lambda: "somebody is still there")


def test_what_a_run_found_is_told_where_its_files_cannot_be_written(tmp_path):
    (tmp_path / "requests.jsonl").mkdir()
    words = ["exec=simulated", "workload=synthetic", "workload.num_sessions=2"]
    with pytest.raises(NotWritten, match=f"Is a directory: '{tmp_path}/requests.jsonl'") as raised:
        LocalCluster(load_config(words)).run(tmp_path)
    assert raised.value.report["num_finished"] == 2 and not (tmp_path / "report.json").exists()
    command = [sys.executable, str(ROOT / "scripts" / "run.py"), *words, f"hydra.run.dir={tmp_path}"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and "colocated-0" in ended.stdout and "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1] == f"error: [Errno 21] Is a directory: '{tmp_path}/requests.jsonl'"
