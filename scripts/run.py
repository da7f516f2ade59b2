"""One experiment: a cluster on a workload, and an output directory that says what was run and what came out.

python scripts/run.py                                            # the default: one instance, the chat workload
python scripts/run.py index=none workload.rate=2                 # one word an ablation
python scripts/run.py exec=simulated cluster=colocated_4 policy=least_load
python scripts/run.py -m index=none,radix workload.rate=1,2,4    # a sweep: one run after the other
"""

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from memserve.cluster.local import LocalCluster
from memserve.compose import config_dir, resolve
from memserve.metrics.progress import Progress
from memserve.metrics.table import print_report


@hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="run")
def main(composed: DictConfig) -> None:
    try:
        cluster = LocalCluster(resolve(composed))
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"pool of an instance: {cluster.memory}")
    output_dir = Path(HydraConfig.get().runtime.output_dir)
    with Progress() as progress:
        report = cluster.run(output_dir, progress=progress)
    print_report(report, title=" ".join(HydraConfig.get().overrides.task) or "defaults")
    model = cluster.engine.model
    if model is not None and model.decode_graph is not None:
        print(f"decode step compiled in {model.decode_graph.compile_s:.0f} s (cached for the next run)")
    print(f"written to {output_dir}")


if __name__ == "__main__":
    main()
