"""Options that several scripts have, and what one of them writes. Knows no script."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memserve.metrics.output import environment


def new_file(word: str) -> Path:
    """For argparse's type=: a file that can be written once all is done, which is the wrong time to find out."""
    path = Path(word)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{word}: expected a file in a directory that is there")
    return path


def new_directory(word: str) -> Path:
    """For argparse's type=: a directory, made where there is none, since the end is the wrong time to find out."""
    path = Path(word)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{word}: expected a directory, or where one can be made: {error}") from error
    return path


def integer(word: str, least: int = 0) -> int:
    """For argparse's type=: from `least` (0 or more) on."""
    if not (word.isascii() and word.isdigit() and int(word) >= least):
        raise argparse.ArgumentTypeError(f"{word}: expected an integer >= {least}")
    return int(word)


def integers(word: str, least: int = 0) -> list[int]:
    """For argparse's type=: from `least` (0 or more) on, joined by commas."""
    parts = word.split(",")
    if not all(part.isascii() and part.isdigit() and int(part) >= least for part in parts):
        raise argparse.ArgumentTypeError(f"{word}: expected integers >= {least}, joined by commas")
    return [int(part) for part in parts]


def write_figures(path: Path, figures: Mapping[str, Any]) -> None:
    """What was measured, and the environment in which, as JSON."""
    path.write_text(json.dumps({"environment": environment({}, []), **figures}, indent=2) + "\n", encoding="utf-8")
