"""docs/options.md is what configs/ says."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def list_options(script):
    return script("list_options")


def test_the_page_of_options_is_what_the_script_makes(list_options) -> None:
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == list_options.page(), (
        "python scripts/list_options.py > docs/options.md"
    )


def test_every_group_and_word_is_on_it(list_options) -> None:
    page = list_options.page()
    for path in (ROOT / "configs").rglob("*/*.yaml"):
        section = page.split(f"\n## `{path.parent.relative_to(ROOT / 'configs').as_posix()}`\n")[1].split("\n## ")[0]
        assert f"`{path.stem}`" in section, path


def test_an_option_has_its_path_its_value_and_a_comment_of_several_lines(list_options) -> None:
    text = "a:  # what it holds\n  b: 1 # one\n    # and more\n  c: {d: 2}\n_target_: x.Y\n"
    assert [(o.key, o.value, o.comment) for o in list_options.options_of(text)] == [
        ("a", "", "what it holds"),
        ("a.b", "1", "one and more"),
        ("a.c", "{d: 2}", ""),
    ]


def test_a_class_in_a_node_is_no_option(list_options) -> None:
    assert [o.key for o in list_options.entries("x:\n  _target_: a.B\n  y: 2\n")] == ["x", "x._target_", "x.y"]
    assert [o.key for o in list_options.options_of("x:\n  _target_: a.B\n  y: 2\n")] == ["x.y"]
