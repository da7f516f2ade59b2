"""The configuration's schema: plain dataclasses. Knows types; cross-field rules are in checks.py.

Nodes typed `Any` are objects to build: a `_target_` and the arguments of that class, checked against its signature;
of a composed configuration they are plain dicts.
"""

from dataclasses import FrozenInstanceError, dataclass, field
from typing import Any

from omegaconf import MISSING


class Section:
    """Options that are given once. Not a frozen dataclass: hydra-core 1.3 refuses every override of a frozen schema."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):
            raise FrozenInstanceError(f"{name}={getattr(self, name)!r}: a composed configuration is read-only")
        super().__setattr__(name, value)


@dataclass
class ModelConfigNode(Section):
    """Which model runs and how. `path` and `random` exclude each other.

    fused_rows: captured decode steps of up to so many requests have kernels that fuse products with what is around.
    early_launches: kernels of captured decode steps are launched while those before them still run.
    near_ties: greedy tokens that rounding alone might have chosen are counted; None: in float32.
    """

    path: str | None = None
    random: dict[str, Any] | None = None
    dtype: str = "float32"
    device: str = "cpu"
    attention: str = "auto"
    compile: bool = False
    fused_rows: int = 0
    early_launches: bool = False
    near_ties: bool | None = None
    max_context: int | None = None
    num_threads: int | None = None


@dataclass
class KVCacheConfig(Section):
    """Sizes of an instance's pool. block_size in tokens; each medium in blocks, or in bytes (integers or 512MiB).

    async_swap: between the media, blocks are copied beside compute.  swap_ahead_blocks: so many are kept free.
    """

    block_size: int = 16
    num_hbm_blocks: int | None = 2048
    num_dram_blocks: int = 0
    hbm_bytes: Any = None
    dram_bytes: Any = None
    async_swap: bool = False
    swap_ahead_blocks: int = 0


@dataclass
class GeometryConfig(Section):
    """What the KV of a model that is simulated would be; an instance of several ranks splits its heads over them."""

    num_layers: int = MISSING
    num_kv_heads: int = MISSING
    head_dim: int = MISSING
    dtype: str = MISSING


@dataclass
class SchedConfig(Section):
    """Limits of the local scheduler, in tokens and requests."""

    token_budget: int = 2048
    chunk_size: int | None = None
    max_running: int = 256
    lookahead: int = 0
    decode_headroom_blocks: int = 8


@dataclass
class TransferConfig(Section):
    """Deadlines of transfers between instances, in seconds, and what becomes of a request whose hand-off fails."""

    deadline_s: float = 60.0
    patience_s: float = 600.0
    retry_s: float = 1.0
    on_failure: str = "recompute"


@dataclass
class SloConfig(Section):
    """Latencies in seconds within which an answer counts as good (`goodput` in the report); None: any will do."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    itl_s: float | None = None
    jct_s: float | None = None


@dataclass
class MeasureConfig(Section):
    """Of which requests figures are: of those that arrive in [from_s, until_s), seconds after the first; None: all."""

    from_s: float | None = None
    until_s: float | None = None


@dataclass
class TensorParallelConfig(Section):
    """Ranks of an instance, over which its model and its KV heads are split: of every one, or of one of a role."""

    every: int = 1
    colocated: int | None = None
    prefill: int | None = None
    decode: int | None = None


@dataclass
class PerRoleConfig(Section):
    """Options of the instances of one role, in the place of those for all (per_role.py says which)."""

    colocated: dict[str, Any] = field(default_factory=dict)
    prefill: dict[str, Any] = field(default_factory=dict)
    decode: dict[str, Any] = field(default_factory=dict)
    store: dict[str, Any] = field(default_factory=dict)


@dataclass
class ControlConfig(Section):
    """What messages to and from the global scheduler take in virtual time, in seconds, and what routing a request does.

    latency_s: one way, between client and global scheduler and between that and an instance.
    """

    latency_s: float = 0.0
    request_s: float = 0.0


@dataclass
class ClusterConfig(Section):
    """One role an instance. silence_s: after so many seconds without a sign of life a process is routed around.

    spares: further ranks, which wait to become instances.  max_unfinished: requests that may be there at a time; None:
    no bound.  patience_s: so long a request waits for an instance to come where none of a role is left.  store, member:
    where each member of the cluster is started by itself, the address at which they meet, and which one this is.
    """

    roles: list[str] = field(default_factory=list)
    spares: int = 0
    tensor_parallel: TensorParallelConfig = field(default_factory=TensorParallelConfig)
    silence_s: float = 10.0
    max_unfinished: int | None = None
    patience_s: float = 0.0
    store: str | None = None
    member: str | None = None


@dataclass
class RunConfig(Section):
    """One run of a cluster on a workload."""

    exec: str = MISSING
    step_time: str = MISSING
    tokens: str = MISSING
    macro_steps: bool = MISSING
    transport: Any = MISSING
    channels: int = 1
    granularity: Any = MISSING
    link: Any = MISSING
    decode_policy: Any = MISSING
    transfer: TransferConfig = field(default_factory=TransferConfig)
    tokenizer: str | None = None
    seed: int = 0
    repeats: int = 1
    seeds: int = 1
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    per_role: PerRoleConfig = field(default_factory=PerRoleConfig)
    mode: Any = MISSING
    policy: Any = MISSING
    index: Any = MISSING
    index_source: Any = MISSING
    eviction: Any = MISSING
    queue: Any = MISSING
    batching: Any = MISSING
    preemption: Any = MISSING
    swap: Any = MISSING
    fetch: Any = MISSING
    store: Any = MISSING
    layout: Any = MISSING
    cost_model: Any = MISSING
    prediction: Any = MISSING
    model: ModelConfigNode = field(default_factory=ModelConfigNode)
    kvcache: KVCacheConfig = field(default_factory=KVCacheConfig)
    geometry: GeometryConfig | None = None
    sched: SchedConfig = field(default_factory=SchedConfig)
    scaling: Any = MISSING
    heir: Any = MISSING
    departure: Any = MISSING
    rebalancing: Any = MISSING
    migration: Any = MISSING
    rejection: Any = MISSING
    slo: SloConfig = field(default_factory=SloConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    workload: Any = MISSING
    tracking: Any = MISSING
