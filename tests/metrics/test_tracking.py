import pytest

from memserve.metrics.report import build_report
from memserve.metrics.tracking import NoTracking, flatten_figures
from memserve.metrics.wandb_tracking import WandbTracking, wandb


def test_every_figure_of_a_report_gets_a_flat_name():
    tree = {"ttft_s": {"p50": 1.5, "p99": None}, "instances": [{"id": "a", "busy_s": 2.0}], "near_ties": 0}
    assert dict(flatten_figures(tree)) == {"ttft_s/p50": 1.5, "instances/0/busy_s": 2.0, "near_ties": 0}


def test_no_tracking_leaves_nothing_behind(tmp_path, make_timeline):
    NoTracking().record({"seed": 0}, build_report([make_timeline()], [], wall_s=1.0), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_wandb_offline_writes_a_run_into_the_output_directory(tmp_path, make_timeline):
    report = build_report([make_timeline()], [], wall_s=1.0)
    WandbTracking(project="memserve-test").record({"seed": 0}, report, tmp_path)
    wandb.teardown()  # waits for wandb's own process, as the end of ours does
    (run_file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    written = run_file.read_bytes()
    assert all(name.encode() in written for name, _ in flatten_figures(report))


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"tracking\.mode='on': expected one of offline, online"):
        WandbTracking(mode="on")
