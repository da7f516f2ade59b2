"""Requests of production traces: lengths, times and shared prefixes are the trace's."""

import json
from pathlib import Path

import numpy as np
import pytest

from memserve import LocalCluster, load_config
from memserve.workload import BadConversation, TraceWorkload

VOCAB = 256
LINES = [
    {"timestamp": 1000, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
    {"timestamp": 1000, "input_length": 1536, "output_length": 700, "hash_ids": [0, 1, 3]},
    {"timestamp": 3500, "input_length": 512, "output_length": 1, "hash_ids": [4]},
]
CSV = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9305900,374,109
"""


class Tokenizer:
    vocab_size = VOCAB


@pytest.fixture
def mooncake(tmp_path):
    def written(*records):
        path = tmp_path / "trace.jsonl"
        path.write_text("\n".join(map(json.dumps, records)) + "\n\n")
        return str(path)

    return written


@pytest.fixture
def azure(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(CSV)
    return str(path)


def prompts(sessions):
    return [session.turns[0].tokens for session in sessions]


def test_equal_hash_ids_are_equal_tokens_and_others_are_not(mooncake):
    a, b, c = prompts(TraceWorkload(mooncake(*LINES)).sessions(Tokenizer, seed=0))
    assert [len(a), len(b), len(c)] == [1100, 1536, 512] and a.dtype == np.int32
    assert (a[:1024] == b[:1024]).all()
    for other in (b[1024:1100], c[:76]):
        assert (a[1024:] == other).mean() < 0.1
    assert (a[:512] == a[512:1024]).mean() < 0.1 and min(a) >= 0 and max(b) < VOCAB
    assert len(np.unique(b)) > 0.9 * VOCAB


def test_times_are_the_trace_s_from_its_first_request_on_and_may_run_faster(mooncake, azure):
    for speedup in (1, 2.5):
        sessions = TraceWorkload(mooncake(*LINES), speedup=speedup).sessions(Tokenizer, 0)
        assert [s.arrival_ns for s in sessions] == [0, 0, round(2.5e9 / speedup)]
    assert [s.arrival_ns for s in TraceWorkload(azure).sessions(Tokenizer, 0)] == [0, 4_250_000_000]


def test_answers_are_as_long_as_the_trace_s_or_as_is_allowed(mooncake, azure):
    lengths = [s.turns[0].params.max_tokens for s in TraceWorkload(mooncake(*LINES)).sessions(Tokenizer, 0)]
    assert lengths == [5, 700, 1]
    short = TraceWorkload(azure, max_output_tokens=50).sessions(Tokenizer, 0)
    assert [s.turns[0].params.max_tokens for s in short] == [44, 50]
    assert all(s.turns[0].params.ignore_eos for s in short)


def test_requests_of_a_trace_without_hash_ids_share_nothing(azure):
    a, b = prompts(TraceWorkload(azure).sessions(Tokenizer, 0))
    assert len(a) == len(b) == 374 and (a == b).mean() < 0.1


def test_a_seed_gives_the_same_tokens_again_and_another_one_others(mooncake):
    path = mooncake(*LINES)
    first, again, other = (prompts(TraceWorkload(path).sessions(Tokenizer, seed))[1] for seed in (3, 3, 4))
    assert (first == again).all() and (first == other).mean() < 0.1


def test_the_first_requests_alone_may_be_asked_for_but_no_more_than_there_are(mooncake):
    path = mooncake(*LINES)
    assert len(TraceWorkload(path, num_sessions=2).sessions(Tokenizer, 0)) == 2
    with pytest.raises(ValueError, match="num_sessions=4, but .* holds 3 requests"):
        TraceWorkload(path, num_sessions=4).sessions(Tokenizer, 0)
    with pytest.raises(ValueError, match="holds 0 requests"):
        TraceWorkload(mooncake()).sessions(Tokenizer, 0)


def test_a_part_of_the_trace_is_played_from_its_own_beginning_by_the_trace_s_time(mooncake):
    times_ms = [5000, 4000, 5999, 6000, 8000, 7999, 6500]
    path = mooncake(*({**LINES[0], "timestamp": time_ms, "output_length": 1 + i} for i, time_ms in enumerate(times_ms)))

    def played(**options):
        workload = TraceWorkload(path, **options)
        sessions = workload.sessions(Tokenizer, 0)
        return [(s.turns[0].params.max_tokens - 1, s.arrival_ns / 1e9) for s in sessions], workload.figures["span_s"]

    assert played(start_s=1, duration_s=2) == ([(3, 0), (5, 1.999), (6, 0.5)], 1.999)
    assert played(start_s=1, duration_s=2, speedup=2, num_sessions=2) == ([(3, 0), (5, 0.9995)], 1.999)
    assert [number for number, _ in played(start_s=1)[0]] == [3, 4, 5, 6]
    assert [number for number, _ in played(duration_s=1)[0]] == [0, 1, 2]  # one of before the first line, too
    with pytest.raises(ValueError, match=r"at least one session, but .* holds 0 requests from 4 s on$"):
        played(start_s=4)
    with pytest.raises(ValueError, match=r"num_sessions=9, but .* holds 1 requests from 3 s on for 2\.5 s"):
        played(start_s=3, duration_s=2.5, num_sessions=9)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"hash_ids": [0, 1]}, "jsonl:2: input_length=1100 with 2 hash_ids: expected one for each 512"),
        ({"hash_ids": [0, 1, -2]}, "jsonl:2: 'hash_ids': expected a list of integers"),
        ({"hash_ids": "012"}, "jsonl:2: 'hash_ids'"),
        ({"input_length": 0}, "input_length=0: expected a number of tokens from 1"),
        ({"output_length": True}, "output_length=True"),
        ({"output_length": 10**9}, "output_length=1000000000"),
        ({"timestamp": "now"}, "timestamp='now': expected milliseconds"),
        ({"timestamp": float("nan")}, "nan"),
        ({"timestamp": 1e16}, "timestamp=1e\\+16: expected milliseconds"),
    ],
)
def test_a_line_that_is_no_request_is_named(mooncake, changed, named):
    with pytest.raises(ValueError, match=named):
        TraceWorkload(mooncake(LINES[0], {**LINES[0], **changed})).sessions(Tokenizer, 0)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("yesterday,3,4", "csv:4: TIMESTAMP='yesterday': expected a date"),
        ("2023-11-16 18:15:46,three,4", "csv:4: ContextTokens='three'"),
        ("2023-11-16 18:15:46,3", "csv:4: 2 cells: expected 3, one for each column"),
        ("2023-11-16 18:15:46,-3,4", "ContextTokens=-3: expected a number of tokens"),
        ("2023-11-16 18:15:46,3,4,5,6", "csv:4: 5 cells: expected 3, one for each column"),
        (f"2023-11-16 18:15:46,{'9' * 5000},4", "csv:4: ContextTokens='9999"),
        (f"{'9' * 200_000},3,4", "csv:4: field larger than"),
    ],
)
def test_a_row_that_is_no_request_is_named(azure, line, named):
    Path(azure).write_text(f"{CSV}{line}\n")
    with pytest.raises(BadConversation, match=named):
        TraceWorkload(azure).sessions(Tokenizer, 0)


@pytest.mark.parametrize("header", ['"TIMESTAMP","ContextTokens","GeneratedTokens"', CSV.partition("\n")[0]])
def test_columns_are_found_by_name_in_any_order_and_quotes(azure, header):
    rows = [line.split(",") for line in CSV.splitlines()[1:]]
    names, order = header.split(","), (1, 0, 2)
    text = "\n".join(",".join(row[i] for i in order) for row in [names, *rows])
    expected = [(s.arrival_ns, len(s.turns[0].tokens)) for s in TraceWorkload(azure).sessions(Tokenizer, 0)]
    Path(azure).write_text(text)
    assert [(s.arrival_ns, len(s.turns[0].tokens)) for s in TraceWorkload(azure).sessions(Tokenizer, 0)] == expected


def test_a_file_that_is_no_trace_is_named(tmp_path):
    texts = {
        "TIMESTAMP,Tokens\n": "no column ContextTokens",
        "TIMESTAMP,ContextTokens,GeneratedTokens,ContextTokens\n": "trace:1: 2 columns ContextTokens: expected one",
        "[1]\n": "trace:1: expected an object",
        "timestamp,contexttokens,generatedtokens\n": "or a header with TIMESTAMP, ContextTokens",
        "nonsense\n": "trace:1",
    }
    for text, named in texts.items():
        path = tmp_path / "trace"
        path.write_text(text)
        with pytest.raises(BadConversation, match=named):
            TraceWorkload(str(path)).sessions(Tokenizer, 0)
    with pytest.raises(ValueError, match=r"workload\.path=.*nowhere"):
        TraceWorkload(str(tmp_path / "nowhere")).sessions(Tokenizer, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("speedup", 0),
        ("speedup", "fast"),
        ("hash_tokens", 0),
        ("num_sessions", 0),
        ("max_output_tokens", 0),
        ("skip_empty", 1),
        ("start_s", -1),
        ("duration_s", "long"),
    ],
)
def test_options_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        TraceWorkload("trace", **{name: value})


WORDS = ["exec=simulated", "tokens=workload", "workload=trace", "model.max_context=131072", "cluster=colocated_2",
         "kvcache.num_hbm_blocks=40000"]  # fmt: skip


def test_a_cluster_plays_it_and_finds_the_prefixes_that_it_shares(mooncake):
    spread = [{**line, "timestamp": 60_000 * i} for i, line in enumerate([*LINES, LINES[0]])]
    report = LocalCluster(load_config([*WORDS, f"workload.path={mooncake(*spread)}", "policy=prompt_tree"])).run()
    assert report["num_finished"] == 4 and report["tokens"]["generated"] == 5 + 700 + 1 + 5
    assert report["tokens"]["cached_local"] == 1024 + 1088  # of the second, and of the first one's repetition


def test_session_affinity_keeps_a_chat_of_a_trace_on_one_instance_though_its_requests_overlap(mooncake, tmp_path):
    lines = [
        {"chat_id": n, "parent_chat_id": n - 8 if n >= 8 else -1, "timestamp": n * 0.01, "input_length": 40,
         "output_length": 500 if n != 5 else 0, "hash_ids": [n % 8, n % 8 + 8, n + 100]}
        for n in range(64)
    ]  # fmt: skip
    words = [f"workload.path={mooncake(*lines)}", "workload.skip_empty=true", "policy=session_affinity"]
    cluster = LocalCluster(load_config([*WORDS, *words, "cluster=colocated_4", "seeds=2"]))
    report = cluster.run(tmp_path / "out")
    assert report["num_finished"] == 63 and report["num_sessions"] == 8
    assert report["workload"] == {"format": "Qwen-Bailian", "time_unit": "s", "hash_tokens": 16, "skipped_empty": 1,
                                  "span_s": 0.63}  # fmt: skip
    places = {
        (r["session_id"], r["instance"])
        for r in map(json.loads, (tmp_path / "out/requests.jsonl").read_text().splitlines())
    }
    assert len(places) == 8 and len({instance for _, instance in places}) > 1
    assert report["tokens"]["cached_local"] > 0


def test_a_real_trace_has_the_hit_ratio_that_its_hash_ids_promise(shared_workloads):
    """Of everything that is cached for good: a prompt's share that lies within what some earlier one began with."""
    path, seen, found, total = shared_workloads / "mooncake_conversation_trace.jsonl", set(), 0, 0
    records = [json.loads(line) for line in path.read_text().splitlines()[:300]]
    words = [
        f"workload.path={path}",
        "workload.num_sessions=300",
        "workload.max_output_tokens=1",
        "workload.speedup=0.01",
    ]
    report = LocalCluster(load_config([*WORDS, *words, "cluster=colocated_1", "kvcache.num_hbm_blocks=300000"])).run()
    for record in records:
        known = [hash_id in seen for hash_id in record["hash_ids"]]
        num_known = known.index(False) if False in known else len(known)
        found += min(512 * num_known, (record["input_length"] - 1) // 16 * 16)
        total += record["input_length"]
        seen.update(record["hash_ids"])
    assert report["num_failed"] == 0 and report["tokens"]["prompt"] == total
    assert report["hit_ratio"] == pytest.approx(found / total, rel=0.01)
