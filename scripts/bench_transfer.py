"""How fast KV moves between two processes of this machine, beside a copy and a bare gloo process group.

    python scripts/bench_transfer.py                                   # everything, some minutes
    python scripts/bench_transfer.py --parts sizes,scattered --repeats 20
    python scripts/bench_transfer.py --megabytes 2560 --layers 40      # all of the request that the paper moves
    python scripts/bench_transfer.py --parts device --device cuda --megabytes 4096    # two processes on one GPU
    python scripts/bench_transfer.py --out transfer.json

sizes: messages of 16 KB to 256 MB from and to scattered places, small ones many at a time; packed is one message that
is gathered from rows of 16 KB.  scattered: 8 times 256 blocks of 16 KB.  granularity: 2048 tokens of a cache of
Llama2-13B's shape, blocks of 16 tokens, with as many layers as --layers says, or as fit.  fig11: the same by one call
a region (discrete) and one call a block (aggregated), over 1 to 16 channels of gloo.  device: the
same request, on the CPU or within one GPU, beside one plain copy of as many bytes there. The ratio is that of rates, to
what stands beside it; its goals are the project's. A move's time ends when its receiver has said that it has all
bytes. Times are medians of --repeats, what is compared taken in turn. The paper's ratios are of its machine (Fig. 11a,
NCCL on NVLink).
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch
from options import integers, new_file
from rich.console import Console
from rich.table import Table
from transfer_ends import Ends
from transfer_figures import (
    CHANNELS,
    LLAMA2_13B,
    NUM_BLOCKS,
    SIZES,
    TransferFigure,
    device_figures,
    fig11_figures,
    granularity_figures,
    scattered_figures,
    size_figures,
)

from memserve.metrics.output import environment

PARTS = ("sizes", "scattered", "granularity", "fig11", "device")
ON_A_GPU = ["device"]  # of the parts
ROOM = 1.2  # an arena beside a request: so that its blocks lie scattered
MB = 1 << 20


def measure(part: str, ends: Ends, args: argparse.Namespace) -> Iterator[TransferFigure]:
    """The figures of one part. Raises ValueError where the memories are too small for it."""
    if part == "sizes":
        yield from size_figures(ends, [s for s in args.sizes if s <= len(ends.memory)], args.repeats, args.seed)
    elif part == "scattered":
        yield from scattered_figures(ends, args.repeats, args.seed)
    elif part == "granularity":
        yield from granularity_figures(ends, args.layers, args.repeats, args.seed)
    elif part == "device":
        yield from device_figures(ends, args.layers, args.repeats, args.seed)
    else:
        yield from fig11_figures(ends, args.layers, args.channels, args.repeats, args.seed)


def layers_that_fit(num_bytes: int) -> int:
    """Layers of the 13B model whose KV of one request has room to scatter; at least one."""
    layer_bytes = NUM_BLOCKS * 2 * LLAMA2_13B.layer_block_bytes
    return max(1, min(LLAMA2_13B.num_layers, int(num_bytes / ROOM / layer_bytes)))


def table_of(title: str, figures: Sequence[TransferFigure]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("", "MB", "calls", "ms", "GB/s", "us / call", "ratio", "beside", "goal", "paper"):
        table.add_column(name, justify="left" if name in ("", "beside") else "right", no_wrap=True)
    for f in figures:
        mark = {None: "", True: " ok", False: " --"}[f.reached]
        goal = f"{f.goal_gb_per_s:.1f} GB/s" if f.goal_gb_per_s else f"{f.goal:.2f}" if f.goal else ""
        table.add_row(
            f.what, f"{f.num_bytes / MB:,.2f}", f"{f.num_calls:,}", f"{f.seconds * 1e3:,.2f}", f"{f.gb_per_s:.2f}",
            f"{f.us_per_call:,.1f}", "" if f.ratio is None else f"{f.ratio:.2f}", f.beside, goal + mark,
            "" if f.paper is None else f"{f.paper:.2f}",
        )  # fmt: skip
    return table


def as_json(figure: TransferFigure) -> dict[str, object]:
    derived = ("gb_per_s", "us_per_call", "ratio", "reached")
    return asdict(figure) | {name: getattr(figure, name) for name in derived}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}; joined by commas")
    add("--device", default="cpu", choices=("cpu", "cuda"), help=f"of both memories; cuda: {', '.join(ON_A_GPU)} alone")
    add("--megabytes", type=int, default=512, help="of memory at each end")
    add("--sizes", type=integers, default=list(SIZES), help="bytes of a message, multiples of 16384; larger than the "
        "memory are left out")  # fmt: skip
    add("--layers", type=int, help="of the request; as many as fit by default")
    add("--channels", type=integers, default=list(CHANNELS), help="of part fig11")
    add("--repeats", type=int, default=7)
    add("--seed", type=int, default=0)
    add("--out", type=new_file, help="write the figures as JSON")
    args = parser.parse_args(argv)
    args.parts = args.parts.split(",")
    args.layers = layers_that_fit(args.megabytes * MB) if args.layers is None else args.layers
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"--parts={unknown[0]}: expected of {', '.join(PARTS)}")
    if args.device == "cuda" and args.parts != ON_A_GPU:
        parser.error(f"--device=cuda: expected --parts {','.join(ON_A_GPU)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device=cuda: there is no GPU here")
    if unfit := [size for size in args.sizes if size < SIZES[0] or size % SIZES[0]]:
        parser.error(f"--sizes={unfit[0]}: expected multiples of {SIZES[0]}")
    if unfit := [count for count in args.channels if count not in CHANNELS]:
        parser.error(f"--channels={unfit[0]}: expected of {', '.join(map(str, CHANNELS))}")
    lows = {"megabytes": 8, "layers": 1, "repeats": 1, "seed": 0}
    for name, low in lows.items():
        if getattr(args, name) < low:
            parser.error(f"--{name}={getattr(args, name)}: expected an integer >= {low}")
    return args


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    torch.set_num_threads(1)
    console, figures = Console(width=130), []
    ends = Ends(args.megabytes * MB, args.device)
    try:
        for part in args.parts:
            measured = list(measure(part, ends, args))
            by_layers = f": 2048 tokens of {args.layers} of 40 layers"
            console.print(table_of(part if part in ("sizes", "scattered") else part + by_layers, measured))
            figures += measured
    except ValueError as error:
        sys.exit(f"error: {error}")
    finally:
        ends.close()
    if args.out is not None:
        env = environment({"seed": args.seed}, ["scripts/bench_transfer.py", *argv])
        written = {"figures": [as_json(figure) for figure in figures], "layers": args.layers, "env": env}
        args.out.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
