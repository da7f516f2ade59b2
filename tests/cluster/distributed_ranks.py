"""What every rank of a launch runs: cluster after cluster, in the same processes."""

import faulthandler
import json
import logging
import signal
from dataclasses import replace

from torch.distributed.distributed_c10d import PrefixStore

from memserve.cluster.distributed import DistributedCluster
from memserve.cluster.launch import find_place
from memserve.cluster.torchrun import NO_TORCHRUN


def play(cases, out):
    """cases: [(config, world size), ..], the largest world the launch's own; None: all of it.  out: the file for what
    rank 0 found.
    """
    faulthandler.register(signal.SIGUSR1)  # where it hangs, for whoever waits for it in vain
    place = find_place(max(cases, key=lambda case: case[1] or 0)[0])
    logging.basicConfig(filename=f"{out}.rank-{place.rank}.log", level=logging.INFO)
    found = []
    for number, (cfg, world_size) in enumerate(cases):
        world_size = world_size or place.world_size
        if place.rank >= world_size:
            continue
        store = PrefixStore(f"case/{number}", place.store) if len(cases) > 1 else place.store
        for result in DistributedCluster(cfg, replace(place, world_size=world_size, store=store), NO_TORCHRUN).play():
            tokens = {t.request_id: t.token_ids.tolist() for t in result.timelines}
            ends = {t.request_id: [str(t.reason), t.detail, t.attempt] for t in result.timelines}
            found.append({"tokens": tokens, "ends": ends, "report": result.report, "missing": dict(result.missing)})
    if place.rank == 0:
        out.write_text(json.dumps(found))
