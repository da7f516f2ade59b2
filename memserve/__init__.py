"""memserve: an elastic memory pool for KV caches, with context caching and prefill/decode disaggregation (MemServe).

The public names resolve on first use, so that `import memserve.kvcache` loads neither Hydra nor transformers.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "LLM": "memserve.llm",
    "Output": "memserve.llm",
    "SamplingParams": "memserve.sampling_params",
    "MemPool": "memserve.kvcache",
    "RadixIndex": "memserve.kvcache",
    "NullIndex": "memserve.kvcache",
    "LocalCluster": "memserve.cluster.local",
    "load_config": "memserve.compose",
    "ModelRunner": "memserve.model.runner",
    "HashRunner": "memserve.hash_runner",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'memserve' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
