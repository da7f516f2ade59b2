import json
import shutil
import subprocess
from pathlib import Path

import pytest

from memserve.metrics.output import environment, git_state, load_run, write_output
from memserve.metrics.records import request_record
from memserve.metrics.report import build_report
from memserve.request import FinishReason, TokenLogprobs


def test_a_record_holds_every_event_count_and_token(make_timeline):
    record = request_record(make_timeline("a/1", arrival=0.25))
    assert (record["request_id"], record["session_id"], record["instance"]) == ("a/1", "a", "colocated-0")
    assert [record[f"{event}_s"] for event in ("arrival", "dispatched", "queued", "first_scheduled")] == [
        0.25, 0.25, 0.5, 1.0,
    ]  # fmt: skip
    assert [record[f"{event}_s"] for event in ("prefill_end", "first_token", "finished")] == [2.0, 2.0, 5.0]
    assert record["token_times_s"] == [2.0, 3.0, 5.0] and record["output_token_ids"] == [10, 11, 12]
    without = request_record(make_timeline("a/1", arrival=0.25), with_tokens=False)
    del record["output_token_ids"]
    assert without == record and without["num_generated"] == 3
    assert (record["ttft_s"], record["tpot_s"], record["max_itl_s"], record["jct_s"]) == (1.75, 1.5, 2.0, 4.75)
    assert (record["num_prompt"], record["num_cached_local"], record["num_computed"]) == (100, 40, 60)
    assert (record["num_generated"], record["finish_reason"], record["detail"]) == (3, "length", "")
    assert record["measured"] is True


def test_a_request_that_an_instance_never_saw_is_recorded_with_nulls(make_timeline):
    timeline = make_timeline(token_times=(), scheduled=None, finished=1.0, reason=FinishReason.REFUSED)
    timeline.stats, timeline.detail = None, "prompt of 900 tokens: expected at most 512"
    record = request_record(timeline)
    assert record["queued_s"] is None and record["ttft_s"] is None and record["num_computed"] is None
    assert record["finish_reason"] == "refused" and "900" in record["detail"]
    assert json.loads(json.dumps(record)) == record


def test_logprobs_are_recorded_when_they_were_asked_for(make_timeline):
    timeline = make_timeline()
    assert "logprobs" not in request_record(timeline)
    timeline.logprobs.append(TokenLogprobs(10, -0.5, {10: -0.5, 7: -1.5}))
    record = json.loads(json.dumps(request_record(timeline)))
    assert record["logprobs"] == [{"token_id": 10, "logprob": -0.5, "top": {"10": -0.5, "7": -1.5}}]


def write(directory: Path, timelines, report=None) -> Path:
    return write_output(
        directory,
        config_yaml="seed: 0\n",
        report=build_report(timelines, [], wall_s=1.0) if report is None else report,
        timelines=timelines,
        occupancy=[],
        activity=[],
        environment={"seeds": {"run": 0}},
    )


def test_the_output_directory_holds_the_six_files_and_nothing_else(tmp_path, make_timeline):
    directory = write(tmp_path / "a" / "b", [make_timeline("a/0"), make_timeline("é/1")])
    assert sorted(p.name for p in directory.iterdir()) == [
        "activity.jsonl", "config.yaml", "env.json", "occupancy.jsonl", "report.json", "requests.jsonl",
    ]  # fmt: skip
    lines = (directory / "requests.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["request_id"] for line in lines] == ["a/0", "é/1"]
    assert json.loads((directory / "report.json").read_text())["num_requests"] == 2
    assert (directory / "config.yaml").read_text() == "seed: 0\n"


def test_what_was_written_is_read_back_whatever_a_session_is_called(tmp_path, make_timeline):
    written = write(tmp_path, [make_timeline("a\u2028b\x85/1")])
    assert load_run(written).records[0]["request_id"] == "a\u2028b\x85/1"


def test_a_write_that_fails_leaves_no_report_and_no_half_file(tmp_path, make_timeline):
    write(tmp_path, [make_timeline()])

    def failing():
        yield make_timeline()
        raise OSError("disk full")

    with pytest.raises(OSError, match=r"disk full: .*requests\.jsonl"):
        write(tmp_path, failing(), report={})
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "activity.jsonl", "config.yaml", "env.json", "occupancy.jsonl", "requests.jsonl",
    ]  # fmt: skip
    assert len((tmp_path / "requests.jsonl").read_text().splitlines()) == 1
    with pytest.raises(ValueError, match="JSON"):
        write(tmp_path, [], report={"ttft_s": float("nan")})
    assert not (tmp_path / "report.json").exists()


def test_the_environment_names_versions_machine_threads_and_seeds():
    found = environment({"run": 7}, ["scripts/run.py", "index=none"])
    assert found["seeds"] == {"run": 7} and found["command_line"] == ["scripts/run.py", "index=none"]
    assert all(found["versions"][name] for name in ("python", "torch", "transformers", "numpy"))
    assert found["cpu"]["usable_cpus"] >= 1 and found["threads"]["torch"] >= 1
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not on the PATH: install git")
def test_the_revision_is_that_of_the_repository_that_tracks_the_file(tmp_path):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    tracked, stranger = tmp_path / "tracked.py", tmp_path / "stranger.py"
    tracked.write_text("a = 1\n")
    stranger.write_text("b = 1\n")
    assert git_state(tracked) is None  # no repository here
    git("init", "--quiet")
    git("add", "tracked.py")
    git("commit", "--quiet", "-m", "first")
    assert git_state(tracked) == {"revision": git("rev-parse", "HEAD"), "modified": False}
    assert git_state(stranger) is None  # inside, but not part of it
    tracked.write_text("a = 2\n")
    assert git_state(tracked)["modified"] is True
