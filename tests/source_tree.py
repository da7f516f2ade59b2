"""The repository's own source as syntax trees, for the tests about its structure."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Import:
    """One import statement's target, as a dotted module name. `nested`: not at the top level of its module."""

    module: str
    line: int
    nested: bool


@dataclass(frozen=True)
class Source:
    """One Python file under memserve/ or scripts/. `name`: memserve.sched.routing, scripts.run."""

    path: Path

    @property
    def name(self) -> str:
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    def imports(self) -> Iterator[Import]:
        """Every import, wherever it stands. `from memserve.a import b` yields memserve.a.b where that is a module."""
        top = {id(node) for node in self.tree.body}
        for node in ast.walk(self.tree):
            nested = id(node) not in top
            if isinstance(node, ast.Import):
                yield from (Import(alias.name, node.lineno, nested) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.path}:{node.lineno}: relative import; expected an absolute one"
                module = node.module or ""
                for alias in node.names:
                    full = f"{module}.{alias.name}"
                    yield Import(full if is_module(full) else module, node.lineno, nested)

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        return (n for n in ast.walk(self.tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))

    def classes(self) -> Iterator[ast.ClassDef]:
        return (n for n in ast.walk(self.tree) if isinstance(n, ast.ClassDef))


def is_module(name: str) -> bool:
    """Whether a dotted name is one of our modules or packages."""
    path = ROOT.joinpath(*name.split("."))
    return name.split(".")[0] in ("memserve", "scripts") and (path.with_suffix(".py").is_file() or path.is_dir())


@cache
def sources(*folders: str) -> list[Source]:
    """The files under the given folders (memserve and scripts by default), in order of path; each is parsed once."""
    return [Source(p) for folder in folders or ("memserve", "scripts") for p in sorted((ROOT / folder).rglob("*.py"))]


def num_lines(node: ast.stmt) -> int:
    """Lines of a definition from `def` or `class` to its end."""
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1
