"""Imports go down the floors of docs/design.md, so that any floor can be read, tested and replaced without those above.

A unit is a module or package directly under memserve/, or scripts/ as a whole.
"""

import graphlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib

import pytest
from source_tree import ROOT, Source, is_module, sources

FLOORS = [
    {
        "clock",
        "values",
        "request",
        "sampling_params",
        "decisions",
        "request_stats",
        "messages",
        "timeline",
        "config",
        "jit",
        "mixing",
        "latest",
    },  # 0: words, numbers, kernel launches
    {"transfer"},  # 1: moves and copies tensors; knows no KV
    {"kvcache"},  # 2: blocks
    {"model"},  # 3: tensors
    {"sched"},  # 4: decides; names no tensor
    {
        "instance",
        "handoff",
        "fetches",
        "bequest",
        "deposits",
        "migrations",
        "layer_marks",
        "returns",
        "words",
        "served",
        "given_up",
        "hash_runner",
        "trace_runner",
        "workload",
        "metrics",
    },  # 5
    {"compose", "cluster", "llm", "scripts"},  # 6: drivers
]
FLOOR = {unit: number for number, units in enumerate(FLOORS) for unit in units}

# Units of one floor do not know each other, but for these.
BESIDE = {
    "sampling_params": {"values"},
    "request": {"sampling_params", "values"},
    "values": {"clock"},
    "request_stats": {"decisions"},
    "messages": {"request", "sampling_params", "decisions", "request_stats"},
    "timeline": {"decisions", "request", "request_stats"},
    "config": {"request", "clock"},
    "words": {"fetches", "bequest", "deposits", "migrations"},
    "served": {"words"},
    "given_up": {"served", "words"},
    "returns": {"words", "served"},
    "handoff": {
        "fetches",
        "bequest",
        "deposits",
        "migrations",
        "layer_marks",
        "returns",
        "words",
        "served",
        "given_up",
    },
    "instance": {"handoff", "served", "words"},
    "cluster": {"compose"},
    "llm": {"compose", "cluster"},
    "scripts": {"compose", "cluster", "llm"},
}

# Of a lower unit, only these modules.
ONLY = {("model", "kvcache"): {"memserve.kvcache.layout"}}

# Libraries that only these units may import.
CONFINED = {
    "torch": {"jit", "transfer", "kvcache", "model", "hash_runner", "cluster", "scripts", "metrics"},
    "hydra": {"compose", "cluster", "scripts"},
    "omegaconf": {"config", "compose", "cluster", "scripts"},
    "transformers": {"model", "scripts"},
    "gguf": {"model"},
    "triton": {"jit", "scripts"},
    "wandb": {"metrics"},
    "rich": {"metrics", "cluster", "scripts"},
    "zmq": {"cluster"},
    "time": {"clock"},
    "datetime": {"clock", "transfer", "cluster", "scripts"},  # torch.distributed takes its time limits so
}


def unit_of(module: str) -> str:
    """The unit of a dotted name; the package itself counts with the drivers, since it names the library's API."""
    parts = module.split(".")
    if parts[0] == "scripts" or len(parts) == 1:
        return "scripts"
    return parts[1]


def allowed(source: Source, target: str) -> bool:
    importer, imported = unit_of(source.name), unit_of(target)
    if importer == imported:
        return True
    if target not in ONLY.get((importer, imported), {target}):
        return False
    return FLOOR[imported] < FLOOR[importer] or imported in BESIDE.get(importer, set())


def own_edges() -> list[tuple[Source, str, int, bool]]:
    """(file, imported module of ours, line, nested) for every import of ours."""
    return [(s, i.module, i.line, i.nested) for s in sources() for i in s.imports() if is_module(i.module)]


def test_every_unit_has_a_floor() -> None:
    assert {unit_of(s.name) for s in sources()} <= set(FLOOR)


def test_imports_go_down_the_floors_only() -> None:
    up = [f"{s.path}:{line} imports {target}" for s, target, line, _ in own_edges() if not allowed(s, target)]
    assert not up, "\n".join(up)


def test_our_own_modules_are_imported_at_the_top_level_only() -> None:
    hidden = [f"{s.path}:{line} imports {target}" for s, target, line, nested in own_edges() if nested]
    assert not hidden, "inside a function or under TYPE_CHECKING:\n" + "\n".join(hidden)


def test_there_is_no_import_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for source, target, _, _ in own_edges():
        if target != source.name:
            graph.setdefault(source.name, set()).add(target)
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError naming the cycle


def test_libraries_stay_on_their_floors() -> None:
    strays = [
        f"{s.path}:{i.line} imports {i.module}"
        for s in sources()
        for i in s.imports()
        if unit_of(s.name) not in CONFINED.get(i.module.split(".")[0], {unit_of(s.name)})
    ]
    assert not strays, "\n".join(strays)


def test_every_library_is_declared() -> None:
    declared = {
        re.split(r"[<>=;\[ ]", requirement, maxsplit=1)[0]
        for requirement in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    }
    used = {i.module.split(".")[0] for s in sources("memserve") for i in s.imports()}
    distributions = importlib.metadata.packages_distributions()
    third_party = used - set(sys.stdlib_module_names) - {"memserve"}
    missing = {n for n in third_party if not declared & {d.lower() for d in distributions.get(n, [n])}}
    assert not missing, f"imported but not in pyproject.toml's dependencies: {sorted(missing)}"


@pytest.fixture(scope="module")
def loaded() -> list[set[str]]:
    """What is loaded in a process that sees no GPU: after the cache alone, then the scheduler, then every module."""
    stages = [["memserve.kvcache"], [s.name for s in sources("memserve/sched")], [s.name for s in sources("memserve")]]
    code = f"""import importlib, sys
for names in {stages!r}:
    for name in names: importlib.import_module(name)
    print(*sys.modules)"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [set(line.split()) for line in done.stdout.splitlines()]


def test_every_module_imports_without_a_gpu(loaded: list[set[str]]) -> None:
    assert {s.name for s in sources("memserve")} <= loaded[2]


def test_the_cache_alone_loads_no_config_system_and_no_model_library(loaded: list[set[str]]) -> None:
    assert not {"hydra", "omegaconf", "transformers", "wandb"} & loaded[0]


def test_the_scheduler_alone_loads_no_driver(loaded: list[set[str]]) -> None:
    assert not {"hydra", "transformers", "memserve.model.runner", "memserve.instance"} & loaded[1]


def test_what_takes_seconds_to_import_is_loaded_by_who_uses_it_alone(loaded: list[set[str]]) -> None:
    assert not {"transformers", "torch._dynamo", "torch._inductor"} & loaded[2]
