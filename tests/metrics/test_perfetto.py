import json

import pytest

from memserve import LocalCluster, load_config
from memserve.metrics.perfetto import REQUESTS, trace_of
from memserve.metrics.records import request_record

SIMULATED = ["exec=simulated", "workload.num_sessions=5", "workload.max_turns=3", "workload.max_output_tokens=40"]


def events_of(*words):
    result = LocalCluster(load_config([*SIMULATED, *words])).run_once()
    records = [request_record(timeline) for timeline in result.timelines]
    trace = trace_of(records, result.activity, result.occupancy)
    assert json.loads(json.dumps(trace, allow_nan=False)) == trace
    return result, records, trace["traceEvents"]


def test_every_instance_is_a_process_and_its_steps_follow_each_other():
    result, _, events = events_of("cluster=1p1d", "mode=pd_caching_3")
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert set(names.values()) == {"requests", "prefill-0", "decode-1"} and names[REQUESTS] == "requests"
    for row in result.report["instances"]:
        steps = [e for e in events if e["ph"] == "X" and names[e["pid"]] == row["id"]]
        assert abs(sum(e["dur"] for e in steps) / 1e6 - row["busy_s"]) < 1e-6
        ends = [e["ts"] + e["dur"] for e in steps]
        assert all(end <= e["ts"] + 1e-3 for end, e in zip(ends, steps[1:], strict=False))


@pytest.mark.parametrize("granularity", ["by_layer", "by_request"])
@pytest.mark.parametrize("link", ["nvlink_h800", "ethernet_10g"])
def test_what_begins_ends_and_phases_lie_within_their_request(granularity, link):
    words = ["cluster=1p1d", "mode=pd_caching_3", f"granularity={granularity}", f"link={link}"]
    _, records, events = events_of(*words)
    assert_nested(events)
    for number, record in enumerate(records):
        own = [e for e in events if str(e.get("id")).startswith(f"{REQUESTS}/{number}/")]
        own += [e for e in events if e.get("id") == f"{REQUESTS}/{number}"]
        assert {e["name"] for e in own} == {
            record["request_id"], f"KV of {record['request_id']}", "queue", "prefill", "ask wait", "grant wait",
            "transfer", "decode queue", "decode",
        } or record["num_generated"] == 1  # fmt: skip
        first, last = record["arrival_s"] * 1e6, record["finished_s"] * 1e6
        assert all(first <= e["ts"] <= last for e in own)


def assert_nested(events):
    """In order of time, what ends is what began last, of all that has one id."""
    stacks = {}
    for event in sorted((e for e in events if e["ph"] in "be"), key=lambda e: e["ts"]):
        stack = stacks.setdefault(event["id"], [])
        if event["ph"] == "b":
            stack.append(event["name"])
        else:
            assert stack.pop() == event["name"], event
    assert stacks and not any(stacks.values())


@pytest.mark.parametrize("granularity", ["by_layer", "by_request"])
def test_events_of_one_id_nest_where_requests_wait_for_room_and_migrate(granularity):
    words = [
        "cluster.roles=[prefill,decode,decode]", "mode=pd_caching_3", f"granularity={granularity}", "link=ethernet_10g",
        "workload.num_sessions=40", "workload.rate=100", "kvcache.num_hbm_blocks=200", "sched.chunk_size=64",
        "rebalancing=by_answers",
    ]  # fmt: skip
    _, records, events = events_of(*words)
    assert_nested(events)
    assert any(record["granted_s"] > record["ask_read_s"] + 0.01 for record in records if record["granted_s"])
    assert any(record["migrations"] for record in records)


def test_by_layer_the_transfer_of_kv_lies_beside_queue_and_prefill():
    _, records, events = events_of("cluster=1p1d", "mode=pd_basic", "granularity=by_layer", "link=ethernet_10g")
    begins_us = {(e["id"], e["name"]): e["ts"] for e in events if e["ph"] == "b"}
    for number, record in enumerate(records):
        assert begins_us[f"{REQUESTS}/{number}/KV", "transfer"] == record["granted_s"] * 1e6
        assert record["granted_s"] < record["prefill_end_s"] <= record["arrived_s"]


def test_times_of_two_clocks_nest_nevertheless():
    _, records, _ = events_of("cluster=1p1d", "mode=pd_basic")
    late = [{**r, "ask_read_s": r["asked_s"] - 1, "arrived_s": r["prefill_end_s"] - 1e-4} for r in records]
    late += [{**r, "queued_s": r["arrival_s"] - 1, "decode_scheduled_s": r["finished_s"] + 1} for r in records]
    assert_nested(trace_of(late, [], [])["traceEvents"])


def test_a_colocated_request_has_no_transfer():
    _, _, events = events_of()
    phases = {e["name"] for e in events if e["ph"] == "b" and e["pid"] == REQUESTS and "/" not in e["name"]}
    assert phases == {"queue", "prefill", "decode"}


def test_the_blocks_of_every_instance_are_counted_over_time():
    result, _, events = events_of("cluster=colocated_2")
    assert sum(e["ph"] == "C" for e in events) == len(result.occupancy)
    assert all("free" not in e["args"] for e in events if e["ph"] == "C")


def test_who_waits_for_kv_of_another_instance_fetches_before_it_queues():
    _, records, events = events_of("cluster=colocated_2", "fetch=always", "link=ethernet_10g")
    fetched = {f"{REQUESTS}/{n}": r for n, r in enumerate(records) if r["fetch_end_s"] is not None}
    begins_us = {(e["id"], e["name"]): e["ts"] for e in events if e["ph"] == "b"}
    assert fetched and {key for key, name in begins_us if name == "fetch"} == set(fetched)
    assert all(begins_us[key, "fetch"] == record["queued_s"] * 1e6 for key, record in fetched.items())
    assert all(begins_us[key, "queue"] == record["fetch_end_s"] * 1e6 for key, record in fetched.items())
