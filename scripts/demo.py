"""The demo: a real 135M-parameter chat model answers conversations on two instances, in the paper's six ways.

    python scripts/demo.py [word ...]        # words as for run.py, e.g. workload.num_sessions=8

PD: each instance prefills and decodes, without context caching; PD-CC: with it. 1P1D: one instance prefills and hands
over to one that decodes; C1, C2 and 1P1D-CC (C3) add caching at the prefill instance, at the decode instance, and
the way back (section 5.1, Table 4). All play the same sessions, and the model's own answers become their history.
"""

import argparse
import sys
from collections.abc import Sequence

from compare import SYSTEMS
from rich.console import Console

from memserve.cluster.local import LocalCluster
from memserve.cluster.result import Result
from memserve.compose import load_config
from memserve.metrics.comparison import print_comparison
from memserve.metrics.progress import Progress
from memserve.metrics.report import Report
from memserve.model.tokenizer import Tokenizer

NAMES = {"pd": "PD", "pd_cc": "PD-CC", "1p1d": "1P1D", "c1": "C1", "c2": "C2", "1p1d_cc": "1P1D-CC"}
WORKLOAD = (
    "workload.num_sessions=4",
    "workload.max_turns=3",
    "workload.max_output_tokens=32",
    "workload.think_time_s=1",
    "workload/arrivals=closed_loop",
    "workload.rate=null",
    "workload.arrivals.concurrency=4",
    "layout=aggregated",
    "granularity=by_request_agg",
    "kvcache.num_hbm_blocks=512",
    "model.num_threads=1",  # where cores are shared, a second thread makes every small product wait for its turn
)


def main(words: Sequence[str]) -> None:
    console = Console(width=120)
    results: dict[str, Result] = {}
    for system, own in SYSTEMS.items():
        cluster = LocalCluster(load_config([*own, *WORKLOAD, *words]))
        with Progress(NAMES[system]) as progress:
            results[NAMES[system]] = cluster.run_once(progress)
    console.print(f"pool of an instance: {cluster.memory}")
    print_conversation(results["1P1D-CC"], cluster.engine.tokenizer, console)
    reports: dict[str, Report] = {name: result.report for name, result in results.items()}
    print_comparison(reports, "the same conversations on two instances, in the paper's six ways", console)
    print_worth(results, console)


def print_conversation(result: Result, tokenizer: Tokenizer, console: Console) -> None:
    """The first session, as the model saw and answered it."""
    session_id = result.timelines[0].session_id
    console.rule(f"one of the conversations ({session_id})")
    for timeline in result.timelines:
        if timeline.session_id == session_id:
            console.print(f"[dim]{timeline.request_id}: prompt of {timeline.num_prompt} tokens[/dim]")
            console.print(tokenizer.decode(timeline.token_ids).strip(), markup=False, highlight=False)


def print_worth(results: dict[str, Result], console: Console) -> None:
    """What caching was worth in both settings, and whether any system changed any answer."""
    answers = [{t.request_id: t.token_ids.tolist() for t in result.timelines} for result in results.values()]
    same = sum(all(other.get(request_id) == tokens for other in answers) for request_id, tokens in answers[0].items())
    for off, on in (("PD", "PD-CC"), ("1P1D", "1P1D-CC")):
        computed = results[on].report["tokens"]["computed"] / results[off].report["tokens"]["computed"]
        ttft = results[on].report["ttft_s"]["mean"] / results[off].report["ttft_s"]["mean"]
        console.print(f"{on} computed {computed:.0%} of {off}'s prefill tokens; mean TTFT {ttft:.0%} of its")
    console.print(f"{same} of {len(answers[0])} answers are the same tokens in all systems")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="as for run.py")
    try:
        main(parser.parse_args().words)
    except ValueError as error:
        sys.exit(f"error: {error}")
