"""One rank of test_parallel: runs every case of every model split over as many ranks as it divides by.

Called with rank, size, the directory to meet and to leave results in, and stories260K's directory if there is one.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from mini_engine import RecordingSampler
from parallel_models import CASES, answers, engine_for, model_of
from ranks import join

from memserve.model.parallel import GroupShard


def main(rank: int, size: int, directory: Path, stories: Path | None) -> None:
    join(rank, size, directory)
    groups = {n: dist.new_group(list(range(n))) for n in (2, 3, 4)}
    for (name, num_ranks), cases in CASES.items():
        if rank < num_ranks and (stories or name != "stories"):
            model = model_of(name, stories, GroupShard(groups[num_ranks]))
            results = {case: result(model, case) for case in cases}
            torch.save(results, directory / f"{name}-{num_ranks}-{rank}.pt")
    dist.destroy_process_group()


def result(model, case: str) -> dict:
    sampler = RecordingSampler()
    engine = engine_for(model, case, sampler)
    return {"tokens": answers(engine, case), "logits": sampler.logits, "kv": engine.kv.contiguous()}
