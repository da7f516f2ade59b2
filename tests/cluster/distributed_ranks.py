"""What every rank of test_distributed.py's launches runs: cluster after cluster, in the same processes.

argv: a file of cases, as JSON [[words, world size], ...], and the file for what rank 0 found.
"""

import faulthandler
import json
import logging
import signal
import sys
from dataclasses import replace
from pathlib import Path

from torch.distributed.distributed_c10d import PrefixStore

from memserve import load_config
from memserve.cluster.distributed import DistributedCluster
from memserve.cluster.launch import find_place


def main() -> None:
    faulthandler.register(signal.SIGUSR1)  # where it hangs, for whoever waits for it in vain
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    most = max((case for case in cases), key=lambda case: case[1])
    place = find_place(load_config(most[0]))
    logging.basicConfig(filename=f"{out}.rank-{place.rank}.log", level=logging.INFO)
    found = []
    for number, (words, world_size) in enumerate(cases):
        if place.rank >= world_size:
            continue
        store = PrefixStore(f"case/{number}", place.store)
        cluster = DistributedCluster(load_config(words), replace(place, world_size=world_size, store=store))
        for result in cluster.play():
            tokens = {t.request_id: t.token_ids.tolist() for t in result.timelines}
            ends = {t.request_id: [str(t.reason), t.detail, t.attempt] for t in result.timelines}
            found.append({"tokens": tokens, "ends": ends, "report": result.report, "missing": dict(result.missing)})
    if place.rank == 0:
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
