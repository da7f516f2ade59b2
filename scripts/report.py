"""Runs as one HTML page, and as a trace for ui.perfetto.dev, from the output directories that run.py and others leave.

python scripts/report.py outputs/2026-01-31/12-00-00                     # writes report.html into that directory
python scripts/report.py outputs/a outputs/b --out compared.html         # side by side: options that differ, figures
python scripts/report.py outputs/a --trace                               # and steps, transfers and requests over time
python scripts/report.py outputs/sweep/2026-01-31/12-00-00/*             # a sweep's points; those that failed are named
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from options import new_file

from memserve.metrics.output import RunFiles, load_run
from memserve.metrics.page import page_of
from memserve.metrics.perfetto import trace_of


def named(directories: Sequence[Path]) -> dict[str, Path]:
    """Directories by the fewest of their last parts that tell them apart. Raises ValueError for one given twice."""
    resolved = [directory.resolve() for directory in directories]
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"OUTPUT_DIR {', '.join(map(str, directories))}: expected each directory once")
    for depth in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, directories, strict=True))


def finished(directories: Sequence[Path]) -> dict[str, RunFiles]:
    """Those of several runs that have ended well, by their names; of the others it is said why they are left out.

    Raises ValueError where there is none.
    """
    runs = {}
    for name, directory in named(directories).items():
        try:
            runs[name] = load_run(directory)
        except ValueError as error:
            if len(directories) == 1:
                raise
            print(f"left out: {error}", file=sys.stderr)
    if not runs:
        raise ValueError(f"OUTPUT_DIR {', '.join(map(str, directories))}: expected at least one of a finished run")
    return runs


def differences(runs: Mapping[str, RunFiles]) -> dict[str, list[str]]:
    """The options that are not the same in all runs, each with its values in order; "" where a run has no such one."""
    flat = [dict(_flat(OmegaConf.to_container(OmegaConf.create(run.config_yaml)), "")) for run in runs.values()]
    options = dict.fromkeys(option for config in flat for option in config)
    values = {option: [config.get(option, "") for config in flat] for option in options}
    return {option: found for option, found in values.items() if len(set(found)) > 1}


def _flat(tree: Any, path: str) -> list[tuple[str, str]]:
    if not isinstance(tree, dict):
        return [(path, json.dumps(tree))]
    return [leaf for key, value in tree.items() for leaf in _flat(value, f"{path}.{key}" if path else str(key))]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dirs", nargs="+", type=Path, metavar="OUTPUT_DIR", help="what a run was written to")
    parser.add_argument("--out", type=new_file, help="the page; by default report.html in the first run's")
    parser.add_argument("--trace", action="store_true", help="also write trace.json into every OUTPUT_DIR")
    args = parser.parse_args(argv)
    try:
        runs = finished(args.output_dirs)
        out: Path = args.out or next(iter(runs.values())).directory / "report.html"
        written = [out]
        out.write_text(page_of(runs, differences(runs)), encoding="utf-8")
        for run in runs.values() if args.trace else ():
            written.append(run.directory / "trace.json")
            trace = trace_of(run.records, run.activity, run.occupancy)
            written[-1].write_text(json.dumps(trace, allow_nan=False), encoding="utf-8")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(f"written to {path}" for path in written))


if __name__ == "__main__":
    main(sys.argv[1:])
