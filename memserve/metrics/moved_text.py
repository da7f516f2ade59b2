"""Moved text: what a report says of KV that went between instances, for people; a line each, by its name."""

from collections.abc import Mapping
from typing import Any

from memserve.metrics.figure_text import counted, format_figure

MANY_OVERTAKEN = 0.1  # of all answers
_WAYS = {"P -> D": "p_to_d", "D -> P": "d_to_p", "between": "between"}


def moved_texts(report: Mapping[str, Any]) -> dict[str, str]:
    """What moved, where anything did or should have; what stores did; what came of fetches."""
    return {**_transfer_texts(report), **_store_text(report["store"]), **_fetches_text(report["fetches"])}


def _store_text(store: Mapping[str, Any] | None) -> dict[str, str]:
    """What requests found in stores, what these have, and how evenly they share what moves."""
    if store is None:
        return {}
    share, dropped = format_figure(store["hit_ratio"], "share"), store["dropped_tokens"]
    num_tokens, num_requests = (counted(store[key]) for key in ("fetched_tokens", "fetches"))
    found = f"{num_tokens} tokens fetched by {num_requests} requests ({share} of prompts)"
    lost = f"; {counted(dropped)} tokens gone before their turn" * bool(dropped)
    if (num_stores := store["num_stores"]) == 1:
        return {"store": f"{found}; {_kept_text(store)}{lost}"}
    received, sent = (format_figure(store[f"skew_{way}"], "number") for way in ("received", "sent"))
    shared = f"one received up to {received} times the mean, and sent {sent} times"
    return {f"{num_stores} stores": f"{found}; {_kept_text(store)}{lost}; {shared}"}


def _kept_text(store: Mapping[str, Any]) -> str:
    num_lost = store["num_stores"] - store["num_stores_left"]
    if not store["num_stores_left"]:
        return "gone"
    return (
        f"{counted(store['num_indexed_blocks'])} of {counted(store['num_blocks'])} blocks cached at the end, "
        f"{counted(store['num_evicted_blocks'])} evicted{f', {num_lost} gone' * bool(num_lost)}"
    )


def _transfer_texts(report: Mapping[str, Any]) -> dict[str, str]:
    """What moved each way and between instances of one role, where anything did or should have."""
    texts = {}
    ways = {label: report["transfers"][key] for label, key in _WAYS.items()}
    if (store := report["store"]) is not None:
        ways |= {"to the store": store["received"], "from the store": store["sent"]}
    for label, counts in ways.items():
        if any(counts.values()):
            lost = ", ".join(f"{counted(counts[k])} {k}" for k in ("declined", "overtaken", "failed") if counts[k])
            texts[label] = (
                f"{counted(counts['tokens'])} tokens, {_bytes_text(counts)} in "
                f"{counted(counts['transfers'])} transfers, {counted(counts['calls'])} network calls, "
                f"{format_figure(counts['seconds'], 'seconds')}{'; ' * bool(lost)}{lost}"
            )
    texts |= _overtaken_text(report)
    if report["quarantined_blocks"]:
        texts["blocks in quarantine"] = counted(report["quarantined_blocks"])
    return texts


def _bytes_text(counts: Mapping[str, float]) -> str:
    moved, in_vain = (format_figure(counts[key], "mega") for key in ("bytes", "bytes_in_vain"))
    return f"{moved} MB" + (f" ({in_vain} of them in vain)" if counts["bytes_in_vain"] else "")


def _overtaken_text(report: Mapping[str, Any]) -> dict[str, str]:
    """Where clients go on before what was generated is back at the prefill instance, which computes it again then."""
    num_overtaken, num_answers = report["transfers"]["d_to_p"]["overtaken"], report["num_finished"]
    if (measured := report["measured"]) is not None:  # transfers are of the whole run
        num_answers += measured["num_left_out"] - measured["num_left_out_failed"]
    if num_overtaken <= num_answers * MANY_OVERTAKEN:
        return {}
    return {
        "D -> P too late": f"the next turn came first after {counted(num_overtaken)} of {counted(num_answers)} answers "
        "(workload.think_time_s is how long a client takes)"
    }


def _fetches_text(f: Mapping[str, Any]) -> dict[str, str]:
    """What came of the decisions to fetch or to compute, and of those to fetch how right they were."""
    outcomes = [f"{counted(f[key])} {key}" for key in ("fetched", "computed", "refused", "failed") if f[key]]
    texts = {"fetch or compute": ", ".join(outcomes)} if outcomes else {}
    if f["fetched"]:
        actual, arrived, predicted, computing = (
            format_figure(f[key]["p50"], "seconds") for key in ("actual_s", "arrived_s", "predicted_s", "computing_s")
        )
        texts["time to fetch (P50)"] = (
            f"{actual}, {predicted} predicted, {arrived} to the last byte; computing {computing} predicted, "
            f"{counted(f['slower_than_computing'])} took longer"
        )
    if f["unused_tokens"]:
        texts["fetched in vain"] = f"{counted(f['unused_tokens'])} tokens: evicted before their turn (sched.lookahead=)"
    return texts
