"""Every row is sampled by its own parameters, from the distribution they say, and whatever else is in the batch."""

import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from memserve.model.penalties import History
from memserve.model.sampler import NUCLEUS_GUESS, InvalidLogits, Sampler, SamplingRow, kept_floor, uniform
from memserve.sampling_params import SamplingParams

GREEDY = SamplingParams()


def random_logits(num_rows: int, num_tokens: int, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(num_rows, num_tokens, generator=torch.Generator().manual_seed(seed))


def floors(logits_RV: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """Of all rows: with a look at the whole of those where the first look did not tell."""
    floor_R, is_known_R = kept_floor(logits_RV, params)
    whole_R, all_known_R = kept_floor(logits_RV, params, logits_RV.shape[1])
    assert all_known_R.all()
    return torch.where(is_known_R, floor_R, whole_R)


def truncate(logits_RV: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    floor_R = floors(logits_RV, [params] * len(logits_RV))
    return logits_RV.masked_fill(logits_RV < floor_R[:, None], -torch.inf)


def draws(logits_V: torch.Tensor, params: SamplingParams, num: int, seed: int = 7) -> np.ndarray:
    rows = [SamplingRow(params, seed, position) for position in range(num)]
    return Sampler().sample(logits_V.expand(num, -1), rows)[0]


def assert_drawn_from(tokens: np.ndarray, probs: np.ndarray) -> None:
    """Chi-square against `probs` at 5 standard deviations, cells of few expected counts joined."""
    assert not np.isin(tokens, np.flatnonzero(probs == 0)).any()
    expected = probs * len(tokens)
    observed = np.bincount(tokens, minlength=len(probs)).astype(float)
    small = expected < 8
    cells = [(observed[~small], expected[~small]), ([observed[small].sum()], [expected[small].sum()])]
    seen, want = (np.concatenate(parts) for parts in zip(*cells, strict=True))
    seen, want = seen[want > 0], want[want > 0]
    chi2, freedom = ((seen - want) ** 2 / want).sum(), len(want) - 1
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom)


def test_greedy_is_the_argmax_in_any_dtype() -> None:
    logits = random_logits(5, 300)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tokens, logprobs = Sampler().sample(logits.to(dtype), [SamplingRow(GREEDY, 0, 0)] * 5)
        assert tokens.dtype == np.int32
        assert tokens.tolist() == logits.to(dtype).argmax(-1).tolist()
        assert logprobs is None


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_follow_the_softmax_at_the_temperature(temperature: float) -> None:
    logits = random_logits(1, 40, 1.5)[0]
    probs = torch.softmax(logits.double() / temperature, -1).numpy()
    assert_drawn_from(draws(logits, SamplingParams(temperature=temperature), 20_000), probs)


def test_tokens_follow_the_truncated_softmax() -> None:
    logits = random_logits(1, 60, 1.5, seed=1)
    params = SamplingParams(temperature=0.8, top_k=20, top_p=0.7)
    warped = TopPLogitsWarper(0.7)(None, TopKLogitsWarper(20)(None, logits / 0.8))
    probs = torch.softmax(warped[0].double(), -1).numpy()
    assert 1 < np.count_nonzero(probs) < 20
    assert_drawn_from(draws(logits[0], params, 20_000), probs)


def test_positions_and_seeds_give_uniform_uncorrelated_numbers() -> None:
    by_position = np.array([uniform(3, position) for position in range(20_000)])
    by_seed = np.array([uniform(seed, 3) for seed in range(20_000)])
    for numbers in (by_position, by_seed):
        assert_drawn_from((numbers * 64).astype(int), np.full(64, 1 / 64))
        pairs = (numbers[1:] * 8).astype(int) * 8 + (numbers[:-1] * 8).astype(int)
        assert_drawn_from(pairs, np.full(64, 1 / 64))
    assert abs(np.corrcoef(by_position, by_seed)[0, 1]) < 0.04
    assert len(set(by_position) | set(by_seed)) == 2 * 20_000 - len(set(by_position) & set(by_seed))
    assert uniform(2, 1) != uniform(1, 2)


@pytest.mark.parametrize("num_tokens", [50, 5000])
@pytest.mark.parametrize("top_k", [0, 1, 7, 49, 10_000])
@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_what_is_kept_is_what_transformers_keeps(num_tokens: int, top_k: int, top_p: float) -> None:
    logits = random_logits(3, num_tokens, 2.0, seed=num_tokens)
    expected = logits.double()  # in float32, sums of 5000 probabilities err by more than one token
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    got = truncate(logits, SamplingParams(temperature=1, top_k=top_k, top_p=top_p))
    assert torch.equal(got.double(), expected)


@pytest.mark.parametrize("min_p", [0.0, 0.01, 0.3, 1.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (30, 1.0), (0, 0.8), (5, 0.9)])
def test_what_min_p_leaves_of_what_is_kept_is_what_transformers_leaves(min_p: float, top_k: int, top_p: float) -> None:
    logits = random_logits(4, 3000, 2.0, seed=3)
    expected = logits.double()
    for warp in (TopKLogitsWarper(top_k) if top_k else None, TopPLogitsWarper(top_p) if top_p < 1 else None):
        expected = expected if warp is None else warp(None, expected)
    expected = MinPLogitsWarper(min_p)(None, expected) if min_p else expected
    got = truncate(logits, SamplingParams(temperature=1, top_k=top_k, top_p=top_p, min_p=min_p))
    assert torch.equal(got.double(), expected)
    assert min_p < 0.3 or got.isfinite().sum() < 200


def test_min_p_counts_after_the_temperature_and_for_its_own_rows_alone() -> None:
    logits = torch.tensor([[0.0, -1.0, -2.0, -3.0]])
    warm, cold = SamplingParams(temperature=2.0, min_p=0.3), SamplingParams(temperature=0.5, min_p=0.3)
    free = SamplingParams(temperature=2.0)
    rows = [SamplingRow(params, 7, position) for position in range(600) for params in (warm, cold, free)]
    tokens = Sampler().sample(logits.expand(len(rows), -1), rows)[0]
    assert [set(tokens[i::3].tolist()) for i in range(3)] == [{0, 1, 2}, {0}, {0, 1, 2, 3}]


def int32(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [0.6, 1.7])
def test_repetition_is_penalised_as_transformers_does(factor: float, dtype: torch.dtype) -> None:
    logits = random_logits(6, 30).to(dtype)
    generator = np.random.default_rng(1)
    params = SamplingParams(repetition_penalty=factor)
    for length in (1, 7, 60):
        tokens = generator.integers(0, 30, (6, length), dtype=np.int32)
        rows = [
            SamplingRow(params, 0, length, History(row[: length // 2 + 1], row[length // 2 + 1 :])) for row in tokens
        ]
        expected = RepetitionPenaltyLogitsProcessor(factor)(torch.from_numpy(tokens).long(), logits.float())
        assert Sampler().sample(logits, rows)[0].tolist() == expected.argmax(-1).tolist()


def test_presence_and_frequency_count_the_answer_alone() -> None:
    logits = torch.tensor([[3.0, 2.9, 2.5, 1.0]])
    history = History(int32(1, 2), int32(0, 0, 1))
    cases = [
        ({"presence_penalty": 0.3}, 0),  # 2.7, 2.6, 2.5
        ({"presence_penalty": 1.0}, 2),  # 2, 1.9, 2.5
        ({"frequency_penalty": 0.2}, 1),  # 2.6, 2.7, 2.5
        ({"frequency_penalty": 0.2, "presence_penalty": 0.5}, 2),  # 2.1, 2.2, 2.5
        ({"frequency_penalty": 0.1, "repetition_penalty": 2.0}, 1),  # 1.3, 1.35, 1.25, 1: prompt and answer are halved
        ({"frequency_penalty": -1.0}, 0),
    ]
    for how, expected in cases:
        rows = [SamplingRow(SamplingParams(**how), 0, 5, history), SamplingRow(GREEDY, 0, 5)]
        assert Sampler().sample(logits.expand(2, -1), rows)[0].tolist() == [expected, 0], how


def test_penalties_change_what_is_drawn_and_no_logprob() -> None:
    logits = random_logits(1, 6, 0.1)
    params = SamplingParams(temperature=1.0, frequency_penalty=2.0, logprobs=1)
    history = History(int32(0), int32(*[1] * 40, *[2] * 40))
    rows = [SamplingRow(params, 3, position, history) for position in range(300)]
    kept = logits.clone()
    tokens, logprobs = Sampler().sample(logits.expand(300, -1), rows)
    assert set(tokens.tolist()) == {0, 3, 4, 5} and torch.equal(logits, kept)
    assert logprobs is not None and logprobs[0] is not None
    assert logprobs[0].logprob == pytest.approx(float(torch.log_softmax(logits[0], -1)[tokens[0]]), abs=1e-6)


def test_a_nucleus_larger_than_the_guess_is_found_too() -> None:
    logits = random_logits(2, 8 * NUCLEUS_GUESS, 0.1)
    got = truncate(logits, SamplingParams(temperature=1, top_p=0.9))
    probs = torch.softmax(logits.double(), -1)
    kept = got.isfinite()
    assert (kept.sum(-1) > NUCLEUS_GUESS).all()
    assert ((probs * kept).sum(-1) >= 0.9).all()
    smallest = torch.where(kept, probs, 1.0).amin(-1)
    assert ((probs * kept).sum(-1) - smallest < 0.9).all()


def test_tokens_are_drawn_from_a_nucleus_larger_than_the_guess_beside_rows_of_smaller_ones() -> None:
    flat, peaked = random_logits(1, 8 * NUCLEUS_GUESS, 0.1)[0], random_logits(1, 8 * NUCLEUS_GUESS, 9.0)[0]
    params = SamplingParams(temperature=1, top_p=0.9)
    rows = [SamplingRow(params, 7, position) for position in range(40)]
    got = Sampler().sample(torch.stack([flat, peaked] * 20), rows)[0]
    for logits, first in ((flat, 0), (peaked, 1)):
        kept = truncate(logits[None], params)[0]
        reached = torch.softmax(kept.double(), -1).cumsum(-1)
        numbers = torch.tensor([uniform(7, position) for position in range(first, 40, 2)], dtype=torch.float64)
        assert got[first::2].tolist() == torch.searchsorted(reached, numbers, right=True).tolist()
    assert (truncate(flat[None], params).isfinite()).sum() > NUCLEUS_GUESS


def test_rows_of_one_batch_are_cut_each_by_its_own_parameters() -> None:
    logits = random_logits(5, 3 * NUCLEUS_GUESS, 0.5)
    kinds = [(0, 1.0), (5, 1.0), (0, 0.2), (2000, 0.9), (0, 0.95)]
    params = [SamplingParams(temperature=1, top_k=k, top_p=p) for k, p in kinds]
    alone = [float(floors(logits[i : i + 1], params[i : i + 1])) for i in range(5)]
    assert floors(logits, params).tolist() == alone
    assert alone[0] == -torch.inf


def test_tokens_that_tie_with_the_last_one_kept_are_kept() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0]])
    assert truncate(logits, SamplingParams(temperature=1, top_k=1)).isfinite().tolist() == [[False, True, True, False]]


def test_a_row_does_not_depend_on_the_batch_around_it() -> None:
    logits = random_logits(12, 3000)
    kinds = [
        SamplingParams(),
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.3, top_k=5),
        SamplingParams(temperature=1.0, top_p=0.9),
        SamplingParams(temperature=1.0, top_k=900, top_p=0.95),
        SamplingParams(temperature=1.0, logprobs=2),
    ]
    rows = [SamplingRow(kinds[i % 6], seed=100 + i, position=i) for i in range(12)]
    together = Sampler().sample(logits, rows)[0]
    alone = [int(Sampler().sample(logits[i : i + 1], rows[i : i + 1])[0][0]) for i in range(12)]
    assert together.tolist() == alone
    order = [7, 3, 11, 0, 5, 1]
    assert Sampler().sample(logits[order], [rows[i] for i in order])[0].tolist() == [alone[i] for i in order]


def test_another_seed_or_position_gives_other_tokens() -> None:
    logits = random_logits(1, 1000, 0.1)[0]
    params = SamplingParams(temperature=1.0)
    first = draws(logits, params, 50)
    assert first.tolist() == draws(logits, params, 50).tolist()
    assert (first != draws(logits, params, 50, seed=8)).mean() > 0.9
    assert len(set(first.tolist())) > 40


@pytest.mark.parametrize("temperature", [1e30, 1e39, 1e308])
def test_a_huge_temperature_draws_any_token_alike(temperature: float) -> None:
    logits = torch.tensor([[5.0, -3.0, 0.0, 100.0]])
    counts = np.bincount(draws(logits, SamplingParams(temperature=temperature), 4000), minlength=4)
    assert counts.min() > 800


def test_a_tiny_temperature_is_greedy() -> None:
    logits = random_logits(4, 500)
    rows = [SamplingRow(SamplingParams(temperature=t), 1, i) for i, t in enumerate((1e-3, 1e-20, 1e-45, 5e-324))]
    assert Sampler().sample(logits, rows)[0].tolist() == logits.argmax(-1).tolist()


def test_tokens_of_no_probability_are_never_drawn() -> None:
    logits = torch.full((8,), -torch.inf)
    logits[5] = 0.0
    assert set(draws(logits, SamplingParams(temperature=1.0), 200).tolist()) == {5}


def test_logprobs_are_those_of_the_unscaled_softmax() -> None:
    logits = random_logits(3, 100)
    params = [SamplingParams(temperature=0.5, logprobs=3), SamplingParams(), SamplingParams(logprobs=0)]
    tokens, logprobs = Sampler().sample(logits, [SamplingRow(p, 1, 1) for p in params])
    assert logprobs is not None
    expected = torch.log_softmax(logits, -1)
    first, second, third = logprobs
    assert second is None
    assert first is not None and third is not None
    assert first.token_id == tokens[0]
    assert first.logprob == pytest.approx(float(expected[0, tokens[0]]), abs=1e-5)
    assert list(first.top) == expected[0].topk(3).indices.tolist()
    assert list(first.top.values()) == pytest.approx(expected[0].topk(3).values.tolist(), abs=1e-5)
    assert third.top == {}
    assert third.logprob == pytest.approx(float(expected[2].max()), abs=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=1.0, top_p=0.5)], ids=["greedy", "random"])
def test_logits_that_are_not_finite_are_named(bad: float, params: SamplingParams) -> None:
    logits = random_logits(3, 50)
    logits[1, 17] = bad
    with pytest.raises(InvalidLogits, match="row 1 of 3: the largest logit is"):
        Sampler().sample(logits, [SamplingRow(params, 0, 0)] * 3)
    with pytest.raises(InvalidLogits, match="row 0 of 1"):
        Sampler().sample(torch.full((1, 4), -torch.inf), [SamplingRow(params, 0, 0)])
    rows = [SamplingRow(params, 0, 7, request_id=f"r{i}") for i in range(3)]
    with pytest.raises(InvalidLogits, match=r"row 1 of 3 \(request r1, position 7\): the largest .* in torch.float16"):
        Sampler().sample(logits.half(), rows)
