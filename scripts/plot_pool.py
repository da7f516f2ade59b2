"""Who held the pools' blocks over a run, drawn from the output directories that scripts/run.py leaves.

python scripts/plot_pool.py outputs/2026-01-31/12-00-00                  # writes pool.png into that directory
python scripts/plot_pool.py outputs/a outputs/b --out compared.svg       # several runs, one below the other
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from options import new_file

from memserve.metrics.occupancy import load_occupancy
from memserve.metrics.plots import draw_occupancy

SUFFIXES = (".png", ".svg")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draws who held the pools' blocks over a run.")
    parser.add_argument("output_dirs", nargs="+", type=Path, metavar="OUTPUT_DIR", help="what a run was written to")
    parser.add_argument("--out", type=new_file, help="a .png or .svg file; by default pool.png in the first OUTPUT_DIR")
    args = parser.parse_args(words)
    out: Path = args.out or args.output_dirs[0] / "pool.png"
    if out.suffix not in SUFFIXES:
        sys.exit(f"error: --out {out}: expected a file that ends in {' or '.join(SUFFIXES)}")
    try:
        figure = draw_occupancy({str(path): load_occupancy(path) for path in args.output_dirs})
        figure.savefig(out, dpi=120)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
