"""Documentation that names files, messages or options names ones that exist."""

import re
from pathlib import Path

import pytest

from memserve import load_config, messages
from memserve.messages import Message

ROOT = Path(__file__).resolve().parents[1]
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = (
    "memserve/",
    "configs/",
    "scripts/",
    "tests/",
    "docs/",
    "sched/",
    "kvcache/",
    "model/",
    "workload/",
    "metrics/",
)
APART = {"experiment", "tracking"}  # groups of configs/ that the table of words leaves to the text


def exists(reference: str) -> bool:
    path = reference.rstrip("/")
    return any((base / path).exists() for base in (ROOT, ROOT / "memserve"))


@pytest.mark.parametrize("document", DOCS, ids=lambda d: d.name)
def test_every_file_that_is_named_exists(document: Path) -> None:
    named = re.findall(r"`([\w./-]+(?:\.py|\.md|\.yaml|\.txt|\.jsonl|/))`", document.read_text(encoding="utf-8"))
    missing = [n for n in named if n.startswith(FOLDERS) and not n.startswith("outputs") and not exists(n)]
    assert not missing


def test_the_design_lists_every_message_and_no_other() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    section = text.split("## Messages", maxsplit=1)[1].split("\n## ", maxsplit=1)[0]
    listed = set(re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE))
    assert listed == {m.__name__ for m in Message.__args__}
    assert listed <= set(re.findall(r"^\| `(\w+)`", messages.__doc__ or "", flags=re.MULTILINE))


@pytest.mark.parametrize("document", DOCS, ids=lambda d: d.name)
def test_prose_keeps_to_120_columns(document: Path) -> None:
    lines = document.read_text(encoding="utf-8").splitlines()
    assert not [
        n for n, line in enumerate(lines, 1) if len(line) > 120 and not line.startswith("|") and "http" not in line
    ]


def commands() -> list[str]:
    """The overrides of every `python scripts/run.py ...` that the documentation shows."""
    shown = {
        line for d in DOCS for line in re.findall(r"python scripts/run\.py([^`#\n]*)", d.read_text(encoding="utf-8"))
    }
    return sorted(words.strip(" \\") for words in shown if "my_package" not in words)


@pytest.mark.parametrize("words", commands())
def test_every_command_that_is_shown_composes(words: str) -> None:
    overrides = [word for word in words.split() if word != "-m"]
    for i in range(max(len(word.split("=")[1].split(",")) for word in overrides) if overrides else 1):
        load_config([f"{k}={v.split(',')[i % len(v.split(','))]}" for k, v in (w.split("=") for w in overrides)])


def test_the_readmes_cluster_example_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    example = next(block for block in blocks if "LocalCluster" in block)
    exec(compile(example, "README.md", "exec"), {})


def test_the_table_of_words_has_every_group_and_no_word_that_is_none() -> None:
    text = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(\w+)` \| (.*) \|$", text, flags=re.MULTILINE)
    groups = {path.name for path in (ROOT / "configs").iterdir() if path.is_dir()} - APART
    assert groups <= {group for group, _ in table}
    named = [(group, word) for group, cell in table if group in groups for word in re.findall(r"`(\w+)`", cell)]
    assert not [f"{g}={w}" for g, w in named if not (ROOT / "configs" / g / f"{w}.yaml").is_file()]


def test_the_readme_stays_short() -> None:
    """What it has no room for is in docs/experiments.md."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180


def test_the_map_has_every_module_and_no_other() -> None:
    """A module may be named by the end of its path, as far as that says which one it is."""
    text = (ROOT / "docs" / "map.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+\.py)`", text))
    modules = {m.relative_to(ROOT / "memserve").as_posix() for m in (ROOT / "memserve").rglob("*.py")}
    modules = {m for m in modules if not m.endswith("__init__.py")}
    ends = {name: [m for m in modules if m == name or m.endswith("/" + name)] for name in named}
    assert not {name: found for name, found in ends.items() if len(found) != 1 and name not in modules}
    assert not modules - {m for name, found in ends.items() for m in ([name] if name in modules else found)}
