import numpy as np
import pytest

from memserve.messages import Finished, Submit, Tokens, pack_times, pack_tokens
from memserve.request import FinishReason
from memserve.request_stats import RequestStats
from memserve.sampling_params import SamplingParams
from memserve.sched.routed import Routed
from memserve.timeline import RequestTimeline


def tokens(index, num=1):
    return Tokens("r", 0, index, pack_tokens(np.arange(num)), pack_times(np.arange(num)))


def finished(num_generated, reason=FinishReason.LENGTH):
    return Finished("r", 0, reason, "", RequestStats("i-0", 0, 0, 0, 5, 0, 5, num_generated, 0))


def taken(messages):
    """The numbers of the messages in the order in which they are taken."""
    routed, order = Routed(Submit("r", "s", b"", SamplingParams(), 0), RequestTimeline("r", "s", 0, 5)), []
    for message in messages:
        for ready in routed.in_order(message):
            if isinstance(ready, Tokens):
                routed.num_generated = ready.index + len(ready.token_ids) // 4
            order.append(messages.index(ready))
    return order


@pytest.mark.parametrize(
    ("messages", "order"),
    [
        ([tokens(0), tokens(1), finished(2)], [0, 1, 2]),
        ([tokens(1), tokens(0), finished(2)], [1, 0, 2]),
        ([tokens(1), finished(2), tokens(0)], [2, 0, 1]),
        ([tokens(1, 3), tokens(4), finished(5), tokens(0)], [3, 0, 1, 2]),
        ([finished(1), tokens(0)], [1, 0]),
        ([finished(1, FinishReason.ABORTED)], [0]),
        ([tokens(1), finished(2, FinishReason.ABORTED)], [1]),
        ([Finished("r", 0, FinishReason.REFUSED, "", None)], [0]),
    ],
)
def test_what_overtook_the_first_token_waits_for_it_and_a_failure_for_nothing(messages, order):
    assert taken(messages) == order
