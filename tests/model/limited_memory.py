"""A rank that loads an MLP with hardly more memory to spare than its part takes. See test_parallel.

Called with the model's directory, rank and size. Prints the bytes of the file that were mapped in while rows were
loaded, and what came of an attempt to copy one whole tensor.
"""

import resource
import sys
from pathlib import Path

import torch
from parallel_models import WIDE, Part

from memserve.model.loader import Loader
from memserve.model.safetensors_weights import SafetensorsWeights

SLACK_BYTES = 2 << 20


def main(directory: Path, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    weights = SafetensorsWeights(directory)
    loader = Loader(weights, torch.float32, torch.device("cpu"), Part(rank, size))
    num = WIDE.intermediate_size // size
    limit = data_bytes() + 3 * num * WIDE.hidden_size * 4 + SLACK_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    kept = [loader.linear("model.layers.0.mlp", {"gate_proj": num, "up_proj": num}, WIDE.hidden_size, False)]
    print(mapped_bytes())
    kept.append(loader.summed_linear("model.layers.0.mlp.down_proj", WIDE.hidden_size, num, False))
    try:
        weights.tensor("model.layers.0.mlp.down_proj.weight").clone()
    except RuntimeError:
        print("no room for a whole one")


def data_bytes() -> int:
    """What the limit counts: private memory that may be written."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmData")) * 1024


def mapped_bytes() -> int:
    """Bytes of the weights' file that this process has touched."""
    inside, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(".safetensors")
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
