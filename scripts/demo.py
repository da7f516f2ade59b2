"""A real chat model answers real conversations, with and without context caching, and a table says what caching did.

    python scripts/demo.py                # SmolLM2-135M-Instruct on the packaged conversations: `make demo`
    python scripts/demo.py model=tiny     # any option of scripts/run.py

Both runs play the same sessions; in each, the model's own answers become the history of the next turn.
"""

import sys
from collections.abc import Sequence

from rich.console import Console

from memserve.cluster.local import LocalCluster, Result
from memserve.compose import load_config
from memserve.metrics.progress import Progress
from memserve.metrics.report import Report
from memserve.metrics.table import print_comparison
from memserve.model.tokenizer import Tokenizer

SYSTEMS = {"caching off": "index=none", "caching on": "index=radix"}
WORKLOAD = (
    "workload.num_sessions=6",
    "workload.max_turns=4",
    "workload.max_output_tokens=40",
    "workload/arrivals=closed_loop",
    "workload.rate=null",
    "workload.arrivals.concurrency=4",
    "model.num_threads=1",  # where cores are shared, a second thread makes every small product wait for its turn
)


def main(words: Sequence[str]) -> None:
    console = Console()
    results: dict[str, Result] = {}
    for name, word in SYSTEMS.items():
        cluster = LocalCluster(load_config([*WORKLOAD, *words, word]))
        with Progress(name) as progress:
            results[name] = cluster.run_once(progress)
    console.print(f"pool of an instance: {cluster.memory}")
    print_conversation(results["caching on"], cluster.engine.tokenizer, console)
    reports: dict[str, Report] = {name: result.report for name, result in results.items()}
    print_comparison(reports, "the same conversations, without and with context caching", console)
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
    """What caching was worth, and whether it changed any answer."""
    off, on = (results[name] for name in SYSTEMS)
    answers = {t.request_id: t.token_ids.tolist() for t in off.timelines}
    same = sum(answers[t.request_id] == t.token_ids.tolist() for t in on.timelines)
    ttft = on.report["ttft_s"]["mean"] / off.report["ttft_s"]["mean"]
    computed = on.report["tokens"]["computed"] / off.report["tokens"]["computed"]
    console.print(
        f"caching computed {computed:.0%} of the prefill tokens, mean TTFT {ttft:.0%} of that without; "
        f"{same} of {len(answers)} answers are the same tokens"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
