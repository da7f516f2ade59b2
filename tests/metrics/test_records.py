"""A line of requests.jsonl stays short however many instances there are."""

import json

import numpy as np
import pytest

from memserve.decisions import RouteChoice
from memserve.metrics.records import MAX_OTHERS, record_lines

NUM = 200


def choice(chosen, costs):
    cached = np.zeros(NUM, dtype=np.int64)
    cached[[3, 7]] = 32, 64
    requests = np.arange(NUM, dtype=np.int64)[::-1].copy()
    queued_ns = np.full(NUM, 10**9, dtype=np.int64)
    queued_ns[[90, 91]] = 0, 10**8
    labels = [f"prefill-{i}" for i in range(NUM)]
    return RouteChoice(labels, chosen, "because", 100, cached, requests, queued_ns, costs)


def seconds(num_cached, num_new):
    return np.asarray(num_new) * 1e-3


def record_of(make_timeline, route):
    timeline = make_timeline()
    timeline.routes.append(route)
    (line,) = record_lines([timeline])
    return line, json.loads(line)


def test_a_choice_among_many_instances_lists_the_chosen_and_the_soonest(make_timeline):
    line, record = record_of(make_timeline, choice(150, seconds))
    (listed,) = record["routes"]
    assert len(line) < 3000 and listed["num_instances"] == NUM and listed["instance"] == "prefill-150"
    assert len(listed["instances"]) == MAX_OTHERS + 1 and {"prefill-90", "prefill-91", "prefill-7"} < {
        *listed["instances"]
    }
    at = dict(zip(listed["instances"], listed["predicted_s"], strict=True))
    assert at["prefill-150"] == record["predicted_s"] == pytest.approx(1.1)
    assert min(at.values()) == at["prefill-90"] == record["predicted_soonest_s"] == pytest.approx(0.1)
    # the mean is of all, not of those that are listed
    assert record["predicted_elsewhere_s"] == pytest.approx((NUM - 3) / (NUM - 1) * 1.1, abs=0.02)


def test_where_nothing_is_predicted_those_with_most_cached_and_least_to_do_are_listed(make_timeline):
    (listed,) = record_of(make_timeline, choice(3, None))[1]["routes"]
    assert listed["predicted_s"] is None
    assert listed["instances"] == ["prefill-3", "prefill-7", *(f"prefill-{i}" for i in range(NUM - 6, NUM))]
    assert listed["num_cached"] == [32, 64, *[0] * 6] and listed["num_requests"][:2] == [NUM - 4, NUM - 8]
