"""The figures of bench_runner.py: what is run, and what is taken from it. Knows no command line and prints nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from hf_baseline import HFBaseline
from roofline import Machine, Work, decode_work, prefill_work
from step_bench import Step, StepBench

from memserve.clock import Stopwatch, to_s
from memserve.model.llama import load_model
from memserve.model.model_path import OpenedModel

PREFIX_CASES = ((512, 0), (512, 256), (512, 448))  # tokens of the prompt, of them cached


@dataclass(frozen=True)
class Options:
    """Lengths in tokens; what they mean is said in bench_runner.py."""

    batches: Sequence[int]
    prefill: Sequence[int]
    prompt_len: int
    new_tokens: int
    block_size: int
    attention: str
    compile: bool
    repeats: int
    seed: int


@dataclass(frozen=True)
class Figure:
    """One figure of a table. `works`: what its num_tokens tokens cost at least, step by step.

    Shares are of the time of all steps, None where it was not taken apart.
    """

    engine: str
    what: str
    tokens_per_s: float
    num_tokens: int
    works: Sequence[Work]
    scheduler_share: float | None = None
    sampling_share: float | None = None

    def roofline(self, machine: Machine) -> float:
        """Tokens per second that `machine` allows."""
        return self.num_tokens / sum(work.seconds(machine) for work in self.works)


@dataclass(frozen=True)
class PrefixHit:
    """Seconds to the first token of a prompt, and as a share of the uncached prompt's."""

    num_prompt: int
    num_cached: int
    ttft_s: float
    share: float


class Bench:
    """One opened model, our decoder of it, and seeded prompts."""

    def __init__(self, opened: OpenedModel, options: Options) -> None:
        self.opened, self.config, self.options = opened, opened.config, options
        self._rng = np.random.default_rng(options.seed)
        self._model = load_model(opened.config, opened.weights, torch.float32, torch.device("cpu"))
        if options.compile:
            self._model.compile()

    def warm_up(self) -> float:
        """Runs each kind of step once; returns the seconds it took, compilation included."""
        watch, o = Stopwatch(), self.options
        for batch in o.batches:
            self._engine(2 * o.prompt_len, batch).serve(self._prompts([40] * batch), 3)
        for length in o.prefill:
            self._engine(length, 1).serve(self._prompts([length]), 1)
        return to_s(watch.stop_ns())

    def decode(self, batch: int) -> Figure:
        """`batch` ragged prompts, already prefilled, get `new_tokens` tokens each."""
        o = self.options
        runs = []
        for _ in range(o.repeats):
            prompts = self._ragged(batch)
            engine = self._engine(2 * o.prompt_len + o.new_tokens, batch)
            engine.preload(prompts)
            runs.append([step for step in engine.serve(prompts, o.new_tokens)[0] if step.decode])
        return _of_runs(f"decode, batch {batch}", runs, [decode_work(self.config, s.seq_lens) for s in runs[0]])

    def prefill(self, length: int) -> Figure:
        """One prompt of `length` tokens, up to its first token."""
        engine, runs = self._engine(length, 1), []
        for _ in range(self.options.repeats):
            engine.forget()
            runs.append(engine.serve(self._prompts([length]), 1)[0])
        return _of_runs(f"prefill, {length} tokens", runs, [prefill_work(self.config, length)])

    def of_hugging_face(self) -> list[Figure]:
        """The same figures of transformers: decode once for each batch, prefill as often as ours."""
        baseline, o, figures = HFBaseline(self.config, self.opened.weights), self.options, []
        baseline.generate(self._prompts([40]), 3)
        for batch in o.batches:
            prompts = self._ragged(batch)
            _, steps_s, _ = baseline.generate(prompts, o.new_tokens)
            lengths = np.array([len(prompt) for prompt in prompts])
            works = [decode_work(self.config, lengths + i + 1) for i in range(len(steps_s))]
            rate = batch * len(steps_s) / sum(steps_s)
            figures.append(Figure("hf", f"decode, batch {batch}", rate, batch * len(steps_s), works))
        for length in o.prefill:
            first_s = median(baseline.generate(self._prompts([length]), 2)[0] for _ in range(o.repeats))
            works = [prefill_work(self.config, length)]
            figures.append(Figure("hf", f"prefill, {length} tokens", length / first_s, length, works))
        return figures

    def prefix_hits(self) -> list[PrefixHit]:
        """The first token's time with a part of the prompt cached; cases in turn, so that noise meets all alike."""
        engine = self._engine(PREFIX_CASES[0][0], (self.options.repeats + 1) * len(PREFIX_CASES))
        times: dict[int, list[float]] = {num_cached: [] for _, num_cached in PREFIX_CASES}
        for _ in range(self.options.repeats + 1):
            for num_prompt, num_cached in PREFIX_CASES:
                prompt = self._prompts([num_prompt])[0]
                engine.preload([prompt[:num_cached]])
                (step,), _ = engine.serve([prompt], 1)
                assert step.num_tokens == num_prompt - num_cached
                times[num_cached].append(step.total_s)
        ttft_s = {num_cached: median(seconds[1:]) for num_cached, seconds in times.items()}
        return [PrefixHit(n, cached, ttft_s[cached], ttft_s[cached] / ttft_s[0]) for n, cached in PREFIX_CASES]

    def radix_over_none(self) -> float:
        """Throughput with index=radix over that with index=none, on prompts that share nothing, runs in turn.

        The forward is the same work in both, and its noise is larger than what an index costs: both runs are charged
        the mean of their two forwards, and each its own time outside.
        """
        o = self.options
        engines = {index: self._engine(2 * o.prompt_len, 4, index) for index in ("none", "radix")}
        ratios = []
        for _ in range(o.repeats + 1):
            prompts, forward_s, outside_s = self._ragged(4), 0.0, {}
            for index, engine in engines.items():
                engine.forget()
                steps, _ = engine.serve(prompts, o.new_tokens)
                forward_s += _sum(steps, lambda s: s.forward_s) / len(engines)
                outside_s[index] = _outside_s(steps)
            ratios.append((forward_s + outside_s["none"]) / (forward_s + outside_s["radix"]))
        return median(ratios[1:])

    def _engine(self, num_tokens: int, num_prompts: int, index: str = "radix") -> StepBench:
        """With room for num_prompts of num_tokens each."""
        size = self.options.block_size
        return StepBench(self._model, num_prompts * (num_tokens // size + 2), size, self.options.attention, index)

    def _ragged(self, batch: int) -> list[np.ndarray]:
        mean = self.options.prompt_len
        return self._prompts(self._rng.integers(mean - mean // 8, mean + mean // 8 + 1, batch))

    def _prompts(self, lengths: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        return [self._rng.integers(0, self.config.vocab_size, n, dtype=np.int32) for n in lengths]


def _of_runs(what: str, runs: Sequence[Sequence[Step]], works: Sequence[Work]) -> Figure:
    """The median rate of the runs; `works` are those of the first."""
    rates = [_sum(run, lambda s: s.num_tokens) / _sum(run, lambda s: s.total_s) for run in runs]
    every = [step for run in runs for step in run]
    total_s = _sum(every, lambda s: s.total_s)
    return Figure(
        "memserve",
        what,
        median(rates),
        sum(step.num_tokens for step in runs[0]),
        works,
        _outside_s(every) / total_s,
        _sum(every, lambda s: s.sampling_s) / total_s,
    )


def _outside_s(steps: Sequence[Step]) -> float:
    return _sum(steps, lambda s: s.total_s - s.forward_s)


def _sum(steps: Sequence[Step], value: Callable[[Step], float]) -> float:
    return sum(value(step) for step in steps)
