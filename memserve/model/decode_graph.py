"""DecodeGraph: one decode step of the whole decoder as one compiled graph, for CPUs. Knows no request and no sampling.

torch.compile turns the step into C++: weights packed for its GEMM templates, element-wise work fused, and attention as
loops over the block table that read KV in place. Prefill and mixed batches do not come here, and no answer needs it.
Compiling takes minutes for a model of 30 layers. With torch's own cache on disk the next process takes about one: it
traces all layers again, for single requests and for batches.

Shape legend: R requests, one token each; M blocks of the widest table; B tokens in a block; E hidden size; V
vocabulary; H query heads, K kv heads, G = H / K, D head dim; kv[L, 2, N, B, K, D] as in kvcache/layout.py.
"""

import hashlib
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from memserve.clock import monotonic_ns, to_s
from memserve.model.attention.base import TorchWrite
from memserve.model.batch import ForwardBatch
from memserve.model.ops import Ops, Stream
from memserve.model.rope import RotaryEmbedding

# Most requests of a compiled step; above it products are bound by arithmetic and eager is as fast.
MAX_REQUESTS = 64
# Batch sizes that a runner compiles for at its start: one, and any from two to MAX_REQUESTS.
WARM_UP_REQUESTS = (1, 8)
_SETTINGS: dict[str, Any] = {
    "freezing": True,  # weights are constants, so that the GEMM templates may pack them
    "max_autotune": True,
    "max_autotune_gemm_backends": "CPP,ATEN",
    "cpp_wrapper": True,
    "max_autotune_report_choices_stats": False,
    "autotune_num_choices_displayed": 0,
}
logger = logging.getLogger(__name__)


class Decoder(Protocol):
    """What the graph is traced from; `Llama` is one."""

    layers: torch.nn.ModuleList
    rotary: RotaryEmbedding
    dtype: torch.dtype
    device: torch.device

    def state_dict(self) -> dict[str, torch.Tensor]: ...
    def embed(self, token_ids_T: torch.Tensor) -> Stream: ...
    def logits(self, stream: Stream, ops: Ops) -> torch.Tensor: ...


class DecodeGraph:
    """Shared by all runners of a model; compiled anew for each block size and layout, not for each size of pool.

    It packs copies of the weights, one for single requests and one for batches; the cache on disk holds them too.

    compile_s: seconds spent compiling so far.

    Raises ValueError without a C++ compiler, or on a device or dtype that it is not made for.
    """

    def __init__(self, model: Decoder) -> None:
        if shutil.which("g++") is None and shutil.which("clang++") is None:
            raise ValueError("model.compile=true: needs a C++ compiler, g++ or clang++ on the PATH, and finds none")
        if model.device.type != "cpu" or model.dtype != torch.float32:
            raise ValueError(f"model.compile=true: {model.dtype} on {model.device}: expected torch.float32 on a cpu")
        from torch._inductor.custom_graph_pass import CustomGraphPass  # noqa: PLC0415  # takes 2 s, and few runs compile

        CustomGraphPass.register(WeightsInCacheKey)
        self._model = model
        self._settings = {**_SETTINGS, "post_grad_custom_pre_pass": WeightsInCacheKey(model.state_dict())}
        self.compile_s = 0.0
        # fullgraph: torch would otherwise go on without compiling, silently, after too many variants
        self._compiled: Callable[..., torch.Tensor] = torch.compile(self._trace, fullgraph=True)

    def takes(self, batch: ForwardBatch) -> bool:
        """Whether the graph computes such a batch."""
        return batch.decode_only and batch.num_requests <= MAX_REQUESTS

    def warm_up(self, kv: torch.Tensor) -> None:
        """Compiles for this cache, which must hold nothing yet: block 0 is written."""
        start_ns = monotonic_ns()
        for num_requests in WARM_UP_REQUESTS:
            zeros_R = torch.zeros(num_requests, dtype=torch.int64)
            self._run(zeros_R, zeros_R.clone(), torch.zeros((num_requests, 4), dtype=torch.int64), kv)
        seconds = to_s(monotonic_ns() - start_ns)
        self.compile_s += seconds
        logger.info("compiled the decode step in %.1f s", seconds)

    def step(self, batch: ForwardBatch, kv: torch.Tensor) -> torch.Tensor:
        """Logits [R, V] after each request's token; its KV is written in every layer."""
        assert self.takes(batch)
        tables_RM = batch.block_tables_RM
        if tables_RM.shape[1] == 1:  # a size of one would be compiled apart
            tables_RM = torch.nn.functional.pad(tables_RM, (0, 1))
        return self._run(batch.token_ids, batch.positions_T, tables_RM, kv)

    def _run(
        self, token_ids_R: torch.Tensor, positions_R: torch.Tensor, block_tables_RM: torch.Tensor, kv: torch.Tensor
    ) -> torch.Tensor:
        for tensor in (token_ids_R, positions_R, block_tables_RM):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        torch._dynamo.maybe_mark_dynamic(block_tables_RM, 1)
        torch._dynamo.maybe_mark_dynamic(kv, 2)
        with _compiler_settings(self._settings), torch.no_grad():
            return self._compiled(token_ids_R, positions_R, block_tables_RM, kv)

    def _trace(
        self, token_ids_R: torch.Tensor, positions_R: torch.Tensor, block_tables_RM: torch.Tensor, kv: torch.Tensor
    ) -> torch.Tensor:
        """What is compiled. int64 arguments; logits [R, V]."""
        model = self._model
        attention = _TracedAttention(kv, block_tables_RM, positions_R)
        rotation = model.rotary.rotation(positions_R)
        stream = model.embed(token_ids_R)
        for layer in model.layers:
            stream = layer(stream, rotation, attention)
        return model.logits(stream, attention.ops)


class _TracedAttention(TorchWrite):
    """Attention as plain tensor algebra over the block table, for the compiler to fuse.

    Each block is reduced on its own first, so that its values are read while they are near.
    """

    def __init__(self, kv: torch.Tensor, block_tables_RM: torch.Tensor, positions_R: torch.Tensor) -> None:
        self._kv = kv
        self._block_tables_RM = block_tables_RM
        block_size = kv.shape[3]
        requests_R = torch.arange(len(positions_R))
        self._write_block_R1 = block_tables_RM[requests_R, positions_R // block_size][:, None]
        self._write_offset_R1 = (positions_R % block_size)[:, None]
        slots_MB = torch.arange(block_tables_RM.shape[1] * block_size).view(-1, block_size)
        self._visible_RMB11 = (slots_MB <= positions_R[:, None, None])[..., None, None]

    def write(self, layer: int, new_kv_T2KD: torch.Tensor) -> None:
        index = (torch.tensor(layer), torch.arange(2), self._write_block_R1, self._write_offset_R1)
        self._kv.index_put_(index, new_kv_T2KD)

    def attend(self, layer: int, q_THD: torch.Tensor) -> torch.Tensor:
        keys_NBKD, values_NBKD = self._kv[layer, 0], self._kv[layer, 1]
        head_dim = q_THD.shape[-1]
        q_RKGD = q_THD.view(len(q_THD), keys_NBKD.shape[2], -1, head_dim) * (1 / math.sqrt(head_dim))
        scores_RMBKG = (q_RKGD[:, None, None] * keys_NBKD[self._block_tables_RM][..., None, :]).sum(-1)
        scores_RMBKG = torch.where(self._visible_RMB11, scores_RMBKG, -math.inf)
        weights_RMBKG = (scores_RMBKG - scores_RMBKG.amax((1, 2), keepdim=True)).exp()
        parts_RMBKGD = weights_RMBKG[..., None] * values_NBKD[self._block_tables_RM][..., None, :]
        sums_RMKGD = torch.where(self._visible_RMB11[..., None], parts_RMBKGD, 0.0).sum(2)
        return (sums_RMKGD.sum(1) / weights_RMBKG.sum((1, 2))[..., None]).flatten(1, 2)


class WeightsInCacheKey:
    """A `CustomGraphPass` of Inductor's. Changes no graph; its identity makes torch's cache on disk tell models of one
    shape apart.

    The cache keeps packed weights with the code, but its own key holds their shapes alone: without this, a model would
    be served with the weights of another.
    """

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in weights.items():
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        self._digest = digest.hexdigest()

    def __call__(self, graph: torch.fx.graph.Graph) -> None:
        """Leaves the graph as it is."""

    def uuid(self) -> str:
        return self._digest


@contextmanager
def _compiler_settings(settings: dict[str, Any]) -> Iterator[None]:
    """Inductor's settings for the graph. Without oneDNN: its packed weights cannot be cached on disk."""
    import torch._inductor.config as inductor  # noqa: PLC0415  # takes 2 s, and few runs compile

    onednn: Any = torch.backends.mkldnn  # torch types its switches as the descriptors behind them
    onednn_enabled = onednn.enabled
    onednn.enabled = False  # not by its context manager, which warns wherever there is no Intel GPU
    try:
        with inductor.patch(settings):
            yield
    finally:
        onednn.enabled = onednn_enabled
