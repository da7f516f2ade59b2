"""The figures of bench_runner.py: what is run, and what is taken from it. Knows no command line and prints nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TypeVar

import numpy as np
import torch
from hf_baseline import HFBaseline
from roofline import Machine, Work, decode_work, prefill_work
from step_bench import Step, StepBench

from memserve.clock import Stopwatch, to_s
from memserve.model.llama import load_model
from memserve.model.model_path import OpenedModel

T = TypeVar("T")
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
class Run:
    """num_tokens in `seconds`; `works`: what they cost at least, step by step, on `machine`, measured beside the run.

    outside_s, sampling_s: of the seconds, those outside the forward and those of the sampler; None if not taken apart.
    """

    num_tokens: int
    seconds: float
    works: Sequence[Work]
    machine: Machine
    outside_s: float | None = None
    sampling_s: float | None = None

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.num_tokens / self.seconds

    @property
    def roofline(self) -> float:
        """Tokens per second that the machine allows."""
        return self.num_tokens / sum(self.machine.seconds(work) for work in self.works)


@dataclass(frozen=True)
class Figure:
    """One figure of a table; each property is the median over the runs, shares each of its own run."""

    engine: str
    what: str
    runs: Sequence[Run]

    @property
    def tokens_per_s(self) -> float:
        return median(run.rate for run in self.runs)

    @property
    def roofline(self) -> float:
        return median(run.roofline for run in self.runs)

    @property
    def share(self) -> float:
        """Of the roofline."""
        return median(run.rate / run.roofline for run in self.runs)

    @property
    def scheduler_share(self) -> float | None:
        """Of the time of all steps; None where it was not taken apart."""
        return _share_of(self.runs, [run.outside_s for run in self.runs])

    @property
    def sampling_share(self) -> float | None:
        """As scheduler_share."""
        return _share_of(self.runs, [run.sampling_s for run in self.runs])


@dataclass(frozen=True)
class PrefixHit:
    """Seconds to the first token of a prompt, and as a share of the uncached prompt's."""

    num_prompt: int
    num_cached: int
    ttft_s: float
    share: float


class Bench:
    """One opened model, our decoder of it, and seeded prompts. measure: says how fast the machine is now."""

    def __init__(self, opened: OpenedModel, options: Options, measure: Callable[[], Machine]) -> None:
        self.opened, self.config, self.options = opened, opened.config, options
        self._measure, self._machine = measure, measure()
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

        def run() -> list[Step]:
            prompts = self._ragged(batch)
            engine = self._engine(2 * o.prompt_len + o.new_tokens, batch)
            engine.preload(prompts)
            return [step for step in engine.serve(prompts, o.new_tokens)[0] if step.decode]

        runs = [self._timed(run, lambda s: decode_work(self.config, s.seq_lens)) for _ in range(o.repeats)]
        return Figure("memserve", f"decode, batch {batch}", runs)

    def prefill(self, length: int) -> Figure:
        """One prompt of `length` tokens, up to its first token."""
        engine, work = self._engine(length, 1), prefill_work(self.config, length)

        def run() -> list[Step]:
            engine.forget()
            return engine.serve(self._prompts([length]), 1)[0]

        runs = [self._timed(run, lambda _: work) for _ in range(self.options.repeats)]
        return Figure("memserve", f"prefill, {length} tokens", runs)

    def of_hugging_face(self) -> list[Figure]:
        """The same figures of transformers: decode once for each batch, prefill as often as ours."""
        baseline, o, figures = HFBaseline(self.config, self.opened.weights), self.options, []
        baseline.generate(self._prompts([40]), 3)
        for batch in o.batches:
            prompts = self._ragged(batch)
            (_, steps_s, _), machine = self._beside(partial(baseline.generate, prompts, o.new_tokens))
            lengths = np.array([len(prompt) for prompt in prompts])
            works = [decode_work(self.config, lengths + i + 1) for i in range(len(steps_s))]
            figures.append(
                Figure("hf", f"decode, batch {batch}", [Run(batch * len(steps_s), sum(steps_s), works, machine)])
            )
        for length in o.prefill:
            works, runs = [prefill_work(self.config, length)], []
            for _ in range(o.repeats):
                prompts = self._prompts([length])
                (first_s, _, _), machine = self._beside(partial(baseline.generate, prompts, 2))
                runs.append(Run(length, first_s, works, machine))
            figures.append(Figure("hf", f"prefill, {length} tokens", runs))
        return figures

    def _timed(self, run: Callable[[], list[Step]], work: Callable[[Step], Work]) -> Run:
        steps, machine = self._beside(run)
        return Run(
            sum(step.num_tokens for step in steps),
            _sum(steps, lambda s: s.total_s),
            [work(step) for step in steps],
            machine,
            _outside_s(steps),
            _sum(steps, lambda s: s.sampling_s),
        )

    def _beside(self, run: Callable[[], T]) -> tuple[T, Machine]:
        """What `run` returns, and the machine as it was meanwhile: the mean of just before and just after."""
        before, result = self._machine, run()
        self._machine = self._measure()
        return result, before.mean_with(self._machine)

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


def _share_of(runs: Sequence[Run], parts_s: Sequence[float | None]) -> float | None:
    known = [seconds for seconds in parts_s if seconds is not None]
    return sum(known) / sum(run.seconds for run in runs) if len(known) == len(runs) else None


def _outside_s(steps: Sequence[Step]) -> float:
    return _sum(steps, lambda s: s.total_s - s.forward_s)


def _sum(steps: Sequence[Step], value: Callable[[Step], float]) -> float:
    return sum(value(step) for step in steps)
