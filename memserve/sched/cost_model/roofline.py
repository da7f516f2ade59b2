"""RooflineCostModel: a step's seconds from data sheets, for models and GPUs that nobody here has. Measures nothing.

    seconds = step_s + request_s x requests in the step
            + for each product, and the attention of prompts and of answers:
                  max(operations / (rate x its share), bytes / (bandwidth x bandwidth_share))
            + the other bytes / (bandwidth x bandwidth_share)
            + 2 all-reduces a layer of T h elements, where a model is split over n ranks:
                  link_latency_s + 2 (n - 1) / n x bytes / link's rate

Operators and what each has to do: work.py. The formula is the roofline's (Williams et al. 2009), operator by operator,
since one whole step's maximum would let products hide behind attention's bytes. What a GPU reaches of its computing and
memory rates is a number between 0 and 1 that the options say; links are taken as the sheet has them. Every request of
a step counts as sampled from, a prompt's chunk before its last one too: that is not said of a step.
"""

from dataclasses import dataclass
from math import floor

import numpy as np

from memserve.sched.cost_model.base import SWAP_BLOCK_TOKENS, CostModel, Subject, require_seconds
from memserve.sched.cost_model.work import Number, Shape, StepWork, num_pairs
from memserve.values import require_number, require_part

GIB = 2**30


@dataclass(frozen=True)
class DataSheet:
    """What a data sheet says. tflops: dense, of the weights' dtype.  hbm_gb_per_s: of its memory.

    hbm_gib: of what its memory holds.  link_gb_per_s: to another rank of a model, one way.  link_latency_s: of an
    all-reduce, however short.  host_gb_per_s: to DRAM.
    """

    tflops: float
    hbm_gb_per_s: float
    hbm_gib: float
    link_gb_per_s: float
    host_gb_per_s: float
    link_latency_s: float

    def __post_init__(self) -> None:
        for name in ("tflops", "hbm_gb_per_s", "hbm_gib", "link_gb_per_s", "host_gb_per_s"):
            require_number(f"gpu.{name}", getattr(self, name), "a finite number above 0", minimum=0.0, exclusive=True)
        require_seconds(**{"gpu.link_latency_s": self.link_latency_s})


class RooflineCostModel(CostModel):
    """Costs of a decoder of this shape on one GPU, or split over tensor_parallel of them.

    compute_share, attention_share: of tflops that products and the attention of prompts reach.  bandwidth_share: of
    hbm_gb_per_s, whatever is bound by it.  step_s: of every step beside: scheduling, launches, sampling.  request_s: of
    the host's work for each request in a step.  swap_piece_s: of a copy between HBM and DRAM beside its bytes.

    Raises ValueError for a share that is not in (0, 1], and for ranks that heads cannot be split over.
    """

    def __init__(
        self,
        gpu: DataSheet,
        shape: Shape,
        tensor_parallel: int = 1,
        compute_share: float = 1.0,
        attention_share: float = 1.0,
        bandwidth_share: float = 1.0,
        step_s: float = 0.0,
        request_s: float = 0.0,
        swap_piece_s: float = 0.0,
    ) -> None:
        require_part("cost_model", "gpu", gpu, DataSheet)
        require_part("cost_model", "shape", shape, Shape)
        shares = {"compute": compute_share, "attention": attention_share, "bandwidth": bandwidth_share}
        for name, share in shares.items():
            allowed = "a number above 0, at most 1"
            require_number(f"cost_model.{name}_share", share, allowed, minimum=0.0, maximum=1.0, exclusive=True)
        require_seconds(step_s=step_s, request_s=request_s)
        self._work = work = StepWork(shape, tensor_parallel)
        self._hbm_gib = gpu.hbm_gib
        flop_s, pair_flop_s = (1 / (1e12 * gpu.tflops * share) for share in (compute_share, attention_share))
        byte_s = 1 / (1e9 * gpu.hbm_gb_per_s * bandwidth_share)
        products = (*work.products(1), work.head(1))
        *self._products, self._head = [(product.flops * flop_s, product.num_bytes * byte_s) for product in products]
        kv_bytes = work.attention(0, 1).num_bytes
        self._pair_s, self._kv_s = work.attention(1, 0).flops * pair_flop_s, kv_bytes * byte_s
        latency_s, token_s = _all_reduces_s(work, gpu)
        self._each_s, self._token_s = step_s + latency_s, token_s + work.the_rest(1).num_bytes * byte_s
        self._request_s = request_s
        self._price_swaps(SWAP_BLOCK_TOKENS * kv_bytes / (1e9 * gpu.host_gb_per_s), SWAP_BLOCK_TOKENS, swap_piece_s)

    def check(self, subject: Subject) -> None:
        """Raises ValueError where a model that runs, or the KV whose bytes a simulation counts, is another or none."""
        if not subject.kv:
            raise ValueError("cost_model.shape with geometry=own: blocks would have the bytes of nobody's KV, expected "
                             "tokens=workload and the geometry of the shape")  # fmt: skip
        shape, ranks = self._work.shape, self._work.num_ranks
        ours = {**vars(shape), "num_kv_heads": self._work.num_kv_heads}
        ours |= {"num_heads": shape.num_heads // ranks, "intermediate_size": shape.intermediate_size // ranks}
        whose = "the model that runs" if subject.shape else "geometry"
        for name, theirs in (*subject.shape.items(), *subject.kv.items()):
            if theirs != ours[name]:
                raise ValueError(f"cost_model.shape with tensor_parallel={ranks} has {name}={ours[name]} on a rank: "
                                 f"expected {theirs}, as {whose} has")  # fmt: skip

    def check_pool(self, num_bytes: int) -> None:
        """Raises ValueError where a GPU's memory does not hold its share of the weights and these blocks."""
        weights_gib, pool_gib = self._work.weight_bytes / GIB, num_bytes / GIB
        if weights_gib + pool_gib > self._hbm_gib:
            room_gib = floor(10 * max(self._hbm_gib - weights_gib, 0)) / 10
            raise ValueError(f"cost_model.gpu.hbm_gib={self._hbm_gib:g} for {weights_gib:.1f} GiB of weights on a rank "
                             f"and {pool_gib:.1f} GiB of kvcache: expected kvcache.hbm_bytes of at most "
                             f"{room_gib}GiB, or more ranks")  # fmt: skip

    def _one_s(self, num_cached: int, num_new: int) -> float:
        return float(self._prompt_s(num_cached, num_new))

    def _column_s(self, num_cached: np.ndarray, num_new: np.ndarray) -> np.ndarray:
        return np.where(num_new > 0, self._prompt_s(num_cached, num_new), 0.0)

    def _prompt_s(self, num_cached: Number, num_new: Number) -> Number:
        """One step that computes num_new tokens of one prompt and samples."""
        pairs = num_pairs(num_cached, num_new)
        return self._tokens_s(num_new, 1) + self._attention_s(pairs, num_cached + num_new)

    def step_time_s(self, num_cached: np.ndarray, num_new: np.ndarray, num_more: np.ndarray) -> np.ndarray:
        now, num_answers = step_totals(num_cached, num_new), np.count_nonzero(num_new == 1)
        num_tokens, num_prompts = num_new.sum() - num_answers, len(num_new) - num_answers
        growth = np.array([0, 0, num_answers, num_answers, num_tokens, num_prompts])
        return self.total_s(now + num_more[:, None] * growth)

    def total_s(self, totals_M6: np.ndarray) -> np.ndarray:
        """float64 [M]: seconds of steps with these totals (`step_totals`)."""
        tokens, requests, *attended = totals_M6.T
        answers, prompts = attended[:2], attended[2:]
        return np.asarray(self._tokens_s(tokens, requests) + self._attention_s(*answers) + self._attention_s(*prompts))

    def _tokens_s(self, num_tokens: Number, num_rows: Number) -> Number:
        """Everything but attention, which depends on no more than how many tokens and requests there are."""
        per_row_s, least_s = self._head
        seconds = self._each_s + self._request_s * num_rows + self._token_s * num_tokens
        seconds = seconds + _greater(per_row_s * num_rows, least_s)
        for per_token_s, least_s in self._products:
            seconds = seconds + _greater(per_token_s * num_tokens, least_s)
        return seconds

    def _attention_s(self, pairs: Number, num_kv: Number) -> Number:
        return _greater(self._pair_s * pairs, self._kv_s * num_kv)


def step_totals(num_cached: np.ndarray, num_new: np.ndarray) -> np.ndarray:
    """float64 [6] of a step's columns (int64 [R]): new tokens and requests; then pairs and tokens of KV that attention
    has, first of requests with one new token, then of the others.
    """
    pairs, kv, one = np.asarray(num_pairs(num_cached, num_new)), num_cached + num_new, num_new == 1
    sums = [part.sum() for mask in (one, ~one) for part in (pairs[mask], kv[mask])]
    return np.array([num_new.sum(), len(num_new), *sums], dtype=np.float64)


def _all_reduces_s(work: StepWork, gpu: DataSheet) -> tuple[float, float]:
    """(of a step, of a token in it). By rings: each rank sends 2 (n - 1) / n of the elements."""
    shape, ranks = work.shape, work.num_ranks
    if ranks == 1:
        return 0.0, 0.0
    num_bytes = 2 * (ranks - 1) / ranks * shape.hidden_size * shape.bytes_per_element
    num_calls = 2 * shape.num_layers
    return num_calls * gpu.link_latency_s, num_calls * num_bytes / (1e9 * gpu.link_gb_per_s)


def _greater(a: Number, b: Number) -> Number:
    return np.maximum(a, b) if isinstance(a, np.ndarray) or isinstance(b, np.ndarray) else max(a, b)
