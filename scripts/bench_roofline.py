"""How far a roofline is from measured steps, at a data sheet's full rates and with shares fitted to them.

python scripts/profile_cost_model.py --out costs.json model.path=DIR model.device=cuda model.dtype=bfloat16
python scripts/bench_roofline.py --costs costs.json                           # the data sheet of the file's GPU
python scripts/bench_roofline.py --costs costs.json --gpu h100                # another word of configs/cost_model/gpu
python scripts/bench_roofline.py --costs costs.json --gpu measured            # of a CPU: this machine's own rates

Steps are the file's: shares are fitted to those that its cost models were fitted to, errors are those of the steps
held out. Beside them stand the file's operator-level costs, which know no hardware, and the noise of the measurement:
no model is nearer. Printed at the end are the words with which a simulation of another model, or of more GPUs of the
kind, takes the shares. A data sheet's rate is of 2-byte weights, and so is the file to be. `measured` takes the best
float32 matrix product and the best reading of memory of this machine, which has to be the one that the file is of.
"""

import argparse
import sys

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from roofline import measure_machine
from step_grid import by_kind

from memserve.cluster.costs import subject_of
from memserve.cluster.make import make
from memserve.compose import load_config
from memserve.sched.cost_model.base import Subject
from memserve.sched.cost_model.fit import fit_roofline, relative_errors
from memserve.sched.cost_model.fitted import FittedCostModel
from memserve.sched.cost_model.roofline import DataSheet, RooflineCostModel
from memserve.sched.cost_model.work import Shape

MEASURED = "measured"
SHEETS = {  # words of configs/cost_model/gpu, by what the driver calls the GPU that the sheet is of, and no other
    "NVIDIA A100-SXM4-80GB": "a100_80g",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA H800": "h800",
    "NVIDIA B200": "b200",
    "NVIDIA L40S": "l40s",
}
UNUSED = 1.0  # of a DataSheet of one rank whose steps swap nothing: rates of its links


def shape_of_whole(subject: Subject) -> Shape:
    """The sizes of the model that a file's steps are of, all ranks together. Raises ValueError where it names none."""
    if not subject.shape:
        raise ValueError("the file names no model's sizes: expected one of scripts/profile_cost_model.py")
    split = ("num_heads", "num_kv_heads", "intermediate_size")
    sizes = {name: size * (subject.tensor_parallel if name in split else 1) for name, size in subject.shape.items()}
    return Shape(**sizes, bytes_per_element=getattr(torch, subject.dtype).itemsize)


def measured_gpu(costs: FittedCostModel) -> DataSheet:
    """This machine's rates, with the threads of the file. Raises ValueError for a file of another one, or of ranks."""
    if costs.file.subject.tensor_parallel > 1:
        raise ValueError(f"--gpu {MEASURED}: expected a file of one rank, whose links need no measuring")
    torch.set_num_threads(costs.file.subject.threads)
    costs.check(subject_of(load_config(["exec=simulated"]), None))
    machine = measure_machine()
    return DataSheet(machine.gemm_flops / 1e12, machine.read_bytes / 1e9, UNUSED, UNUSED, UNUSED, 0.0)


def gpu_of(word: str | None, costs: FittedCostModel) -> DataSheet:
    """What a word names, or the file's own GPU. Raises ValueError for another dtype, and where no sheet is."""
    subject = costs.file.subject
    word = SHEETS.get(subject.machine) if word is None else word
    if word is None:
        raise ValueError(
            f"the file is of {subject.machine}, of which configs/cost_model/gpu has no sheet: expected --gpu"
        )
    dtypes = ("float32",) if word == MEASURED else ("bfloat16", "float16")
    if subject.dtype not in dtypes:
        raise ValueError(f"--gpu {word} with a file of {subject.dtype}: expected one of {' or '.join(dtypes)}")
    if word == MEASURED:
        return measured_gpu(costs)
    words = ["exec=simulated", "cost_model=roofline", f"cost_model/gpu={word}"]
    sheet: DataSheet = make(load_config(words).cost_model["gpu"])
    return sheet


def show(full: RooflineCostModel, fitted: RooflineCostModel, costs: FittedCostModel, console: Console) -> None:
    """A row for each kind of step that was held out."""
    table = Table(
        "held-out steps", "number", "noise %", "full rates / measured", "fitted: mean %", "worst %", "operator: mean %"
    )
    for kind, steps in by_kind(costs.file.held_out).items():
        noise = 100 * float(np.mean([step.spread for step in steps]))
        share = float(np.median(1 + relative_errors(full, steps)))
        off, operator = (100 * np.abs(relative_errors(model, steps)) for model in (fitted, costs.model))
        figures = (f"{noise:.1f}", f"{share:.2f}", f"{off.mean():.1f}", f"{off.max():.0f}", f"{operator.mean():.1f}")
        table.add_row(kind, str(len(steps)), *figures)
    console.print(table)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--costs", required=True, help="a file of profile_cost_model.py")
    parser.add_argument("--gpu", help=f"a word of configs/cost_model/gpu, or {MEASURED}; by default the file's GPU")
    args, console = parser.parse_args(words), Console()
    try:
        costs = FittedCostModel(args.costs, allow_other_machine=args.gpu != MEASURED)
        subject, shape = costs.file.subject, shape_of_whole(costs.file.subject)
        gpu = gpu_of(args.gpu, costs)
        shares = fit_roofline(costs.file.fitted, gpu, shape, subject.tensor_parallel)
    except ValueError as error:
        sys.exit(f"error: {error}")
    console.print(f"{subject.machine}, {subject.dtype}: {gpu.tflops:.3g} TFLOP/s, {gpu.hbm_gb_per_s:.4g} GB/s")
    full, fitted = (RooflineCostModel(gpu, shape, subject.tensor_parallel, **found) for found in ({}, shares))
    show(full, fitted, costs, console)
    console.print(*(f"cost_model.{name}={value:.3g}" for name, value in shares.items()))


if __name__ == "__main__":
    main()
