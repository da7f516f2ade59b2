"""The rules of CONTRIBUTING.md that a program can check."""

import ast
import re
import statistics
from collections import Counter

from source_tree import Source, num_lines, sources

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60
MAX_MEDIAN_FUNCTION_LINES = 12
OBVIOUS_LINES = 12  # a public function no longer than this may be its own explanation
OBVIOUS_CLASS_LINES = 8  # such as a message whose meaning stands in its module's table


def at(source: Source, node: ast.stmt) -> str:
    return f"{source.path}:{node.lineno} {getattr(node, 'name', '')}"


def test_no_file_is_longer_than_300_lines() -> None:
    lengths = {str(s.path): s.text.count("\n") for s in sources()}
    assert not {path: n for path, n in lengths.items() if n > MAX_FILE_LINES}


def test_no_function_is_longer_than_60_lines() -> None:
    assert not [at(s, f) for s in sources() for f in s.functions() if num_lines(f) > MAX_FUNCTION_LINES]


def test_the_median_function_is_about_10_lines() -> None:
    lengths = [num_lines(f) for s in sources("memserve") for f in s.functions()]
    assert statistics.median(lengths) <= MAX_MEDIAN_FUNCTION_LINES


def test_every_module_says_what_it_is() -> None:
    silent = [str(s.path) for s in sources() if s.tree.body and not ast.get_docstring(s.tree)]
    assert not silent


def test_public_classes_have_a_docstring() -> None:
    silent = [
        at(s, c)
        for s in sources("memserve")
        for c in s.classes()
        if not c.name.startswith("_") and num_lines(c) > OBVIOUS_CLASS_LINES and not ast.get_docstring(c)
    ]
    assert not silent, "\n".join(silent)


def test_long_public_functions_have_a_docstring() -> None:
    """Those that override a documented method have its docstring."""
    inherited = {f.name for s in sources("memserve") for f in s.functions() if ast.get_docstring(f)}
    silent = [
        at(s, f)
        for s in sources("memserve")
        for f in s.functions()
        if not f.name.startswith("_")
        and num_lines(f) > OBVIOUS_LINES
        and not ast.get_docstring(f)
        and f.name not in inherited
    ]
    assert not silent, "\n".join(silent)


def test_class_names_are_unique() -> None:
    counts = Counter(c.name for s in sources("memserve") for c in s.classes() if not c.name.startswith("_"))
    assert not [name for name, count in counts.items() if count > 1]


def test_nothing_is_left_to_do_later() -> None:
    later = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    assert not [str(s.path) for s in sources() if later.search(s.text)]


def test_no_check_is_silenced_without_a_reason_on_its_line() -> None:
    silenced = re.compile(r"#\s*(type:\s*ignore|noqa)[^#\n]*$", re.MULTILINE)
    assert not [str(s.path) for s in sources("memserve", "scripts", "tests") if silenced.search(s.text)]


def test_nothing_is_keyed_by_pythons_hash() -> None:
    """`hash()` of a string differs from process to process."""
    calls = [
        f"{s.path}:{node.lineno}"
        for s in sources()
        for node in ast.walk(s.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hash"
    ]
    assert not calls


def test_no_behaviour_is_switched_by_environment_variables() -> None:
    reads = re.compile(r"\bos\.(environ|getenv)\b|\bfrom os import .*\b(environ|getenv)\b")
    torchrun = "memserve.cluster.launch"  # learns its rank so: that is what torchrun tells a process by
    assert not [str(s.path) for s in sources("memserve") if reads.search(s.text) and s.name != torchrun]


def test_no_global_statement_and_no_bare_except() -> None:
    found = [
        f"{s.path}:{node.lineno}"
        for s in sources()
        for node in ast.walk(s.tree)
        if isinstance(node, ast.Global) or (isinstance(node, ast.ExceptHandler) and node.type is None)
    ]
    assert not found


def test_no_body_is_a_stub() -> None:
    """`pass` alone, or raising NotImplementedError, promises what is not there."""
    stubs = [
        at(s, f)
        for s in sources()
        for f in s.functions()
        if isinstance(f.body[-1], ast.Pass) or "NotImplementedError" in ast.dump(f.body[-1])
    ]
    assert not stubs, "\n".join(stubs)
