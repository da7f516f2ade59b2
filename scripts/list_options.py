"""Every option of a run, with its default and what it means, as one page: docs/options.md.

    python scripts/list_options.py > docs/options.md

Read from configs/, whose comments are the text; a word without one has its class's first sentence.
"""

import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hydra.utils import get_object

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
ENTRY = re.compile(r"^(?P<indent> *)(?P<key>[\w.]+):(?: (?P<value>[^#]*[^# ]))?(?: *# (?P<comment>.*))?$")
HEAD = """# Options

Made by `scripts/list_options.py` from the comments in `configs/`. A group's word is `group=word`; an option below it is
`group.option=value`; the word in bold is the default. Given `--cfg job`, `scripts/run.py` prints the whole
configuration and does not run. A class of your own takes the place of a word by `_target_=my_package.MyClass`
([CONTRIBUTING.md](../CONTRIBUTING.md)).
"""


@dataclass
class Option:
    """A line of YAML. key: with those that it lies under, joined by dots."""

    key: str
    value: str
    comment: str


@dataclass
class Word:
    """A file of configs/. about: the comment at its head, or its class's first sentence.  prefix: of its options."""

    name: str
    about: str
    prefix: str
    options: list[Option]


@dataclass
class Group:
    """words: by name.  about: what run.yaml says beside its default."""

    name: str
    default: str | None
    about: str
    words: list[Word] = field(default_factory=list)


def entries(text: str) -> Iterator[Option]:
    """Keys with a value; a comment that goes on in the next lines is taken as one."""
    above: list[tuple[int, str]] = []
    option: Option | None = None
    for line in text.splitlines():
        found = ENTRY.match(line)
        if found is None:
            if option is not None and (rest := re.match(r"^ +# (.*)$", line)) and option.comment:
                option.comment += " " + rest[1]
            continue
        if option is not None:
            yield option
        indent = len(found["indent"])
        above = [(depth, key) for depth, key in above if depth < indent]
        key = ".".join([*(key for _, key in above), found["key"]])
        above.append((indent, found["key"]))
        option = Option(key, found["value"] or "", found["comment"] or "")
    if option is not None:
        yield option


def options_of(text: str) -> list[Option]:
    """Those that somebody can set: no class, no defaults, no mapping that only holds others."""
    found = [o for o in entries(text) if not o.key.endswith("_target_") and o.key.split(".")[0] != "defaults"]
    return [o for o in found if o.value or o.comment]


def first_sentence(target: str) -> str:
    text = " ".join((inspect.getdoc(get_object(target)) or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z])", text, maxsplit=1)[0].removesuffix(":")


def word_of(path: Path, group: str) -> Word:
    lines = path.read_text(encoding="utf-8").splitlines()
    head = []
    for line in lines:
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            head.append(line[2:])
    text = "\n".join(lines)
    target = re.search(r"^ *_target_: (\S+)$", text, flags=re.MULTILINE)
    package = re.search(r"^# @package (\S+)$", text, flags=re.MULTILINE)
    prefix = package[1] + "." if package else group.replace("/", ".") + "."
    about = " ".join(" ".join(head).split()) or (first_sentence(target[1]) if target else "")
    options = [o for o in options_of(text) if o.key != group]
    return Word(path.stem, about, prefix.replace("_global_.", ""), options)


def groups() -> list[Group]:
    """In the order of run.yaml's defaults, those without a default last."""
    text = (CONFIGS / "run.yaml").read_text(encoding="utf-8")
    listed = re.findall(r"^  - (\w+)(?:@\w+)?: (\w+)(?: # (.*))?$", text.split("\nseed:")[0], flags=re.MULTILINE)
    named: dict[str, Group] = {}
    for name, default, about in listed:
        named.setdefault(name, Group(name, default, about))
    for folder in sorted(p for p in CONFIGS.rglob("*") if p.is_dir()):
        name = folder.relative_to(CONFIGS).as_posix()
        group = named.setdefault(name, Group(name, None, ""))
        group.words = [word_of(path, name) for path in sorted(folder.glob("*.yaml"))]
    return list(named.values())


def bullet(text: str, depth: int = 0) -> str:
    indent = "  " * depth
    return textwrap.fill(
        text,
        120,
        initial_indent=f"{indent}- ",
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def option_line(option: Option, prefix: str, depth: int) -> str:
    value = f" = `{option.value}`" if option.value else ""
    return bullet(f"`{prefix}{option.key}`{value}{': ' if option.comment else ''}{option.comment}", depth)


def option_lines(options: list[Option], prefix: str, depth: int, said: set[str]) -> Iterator[str]:
    """One line each; those that say nothing, or what was said of the same option above, share one."""
    plain = [o for o in options if not o.comment or o.key + o.comment in said]
    for option in options:
        if option not in plain:
            said.add(option.key + option.comment)
            yield option_line(option, prefix, depth)
    if values := ", ".join(f"`{prefix}{o.key}` = `{o.value}`" for o in plain if o.value):
        yield bullet(values, depth)


def group_lines(group: Group) -> Iterator[str]:
    yield f"\n## `{group.name}`\n"
    if group.about:
        yield group.about[0].upper() + group.about[1:] + ".\n"
    said = set[str]()
    for word in group.words:
        name = f"**`{word.name}`**" if word.name == group.default else f"`{word.name}`"
        yield bullet(f"{name}: {word.about}" if word.about else name)
        if group.name != "experiment":
            yield from option_lines(word.options, word.prefix, 1, said)


def page() -> str:
    text = (CONFIGS / "run.yaml").read_text(encoding="utf-8")
    plain = [o for o in options_of(text.split("\n\n", maxsplit=1)[1]) if not o.key.startswith("hydra.")]
    lines = [HEAD, "\n## Without a group\n", *(option_line(o, "", 0) for o in plain)]
    for group in groups():
        lines += group_lines(group)
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


if __name__ == "__main__":
    print(page(), end="")
