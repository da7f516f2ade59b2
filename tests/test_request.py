import math

import msgspec
import numpy as np
import pytest

from memserve.messages import Dispatch, Message, Tokens, pack_times, pack_tokens, unpack_times, unpack_tokens
from memserve.request import IntBuffer, Request
from memserve.sampling_params import SamplingParams
from memserve.served import drawn_seed


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", 2**64),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", -2.1),
        ("frequency_penalty", 2.1),
        ("frequency_penalty", "high"),
        ("max_tokens", 0),
        ("max_tokens", 2.0),
        ("seed", -1),
        ("seed", 2**64),
        ("logprobs", 21),
        ("logprobs", -1),
        ("stop", ("",)),
        ("stop", (3,)),
        ("stop", 5),
        ("stop_token_ids", 5),
        ("stop", ("x",) * 17),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", (2**64,)),
        ("ignore_eos", 1),
    ],
)
def test_a_sampling_value_out_of_range_is_named_with_what_is_allowed(name, value):
    with pytest.raises(ValueError, match=f"{name}=.*expected"):
        SamplingParams(**{name: value})


def test_the_largest_sampling_values_go_from_one_instance_to_another():
    params = SamplingParams(top_k=2**64 - 1, seed=2**64 - 1, stop_token_ids=(2**64 - 1,))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


@pytest.mark.parametrize("name", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_each_penalty_alone_penalises(name):
    assert SamplingParams(**{name: 0.5}).penalises and not SamplingParams(temperature=1.0, min_p=0.1).penalises


def test_unknown_sampling_options_raise():
    with pytest.raises(TypeError, match="beam"):
        SamplingParams(beam=3)


def test_a_single_stop_string_and_lists_are_taken():
    params = SamplingParams(stop="\n", stop_token_ids=[1, 2])
    assert params.stop == ("\n",) and params.stop_token_ids == (1, 2)
    assert SamplingParams(stop=None, stop_token_ids=None) == SamplingParams()


def test_numbers_of_numpy_are_those_of_python():
    params = SamplingParams(
        temperature=np.float32(0.5), top_k=np.int64(4), seed=np.uint8(7), stop_token_ids=np.array([1, 2])
    )
    assert params == SamplingParams(temperature=0.5, top_k=4, seed=7, stop_token_ids=(1, 2))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_messages_survive_the_wire():
    tokens = np.array([1, 2, 2**31 - 1], dtype=np.int32)
    dispatch = Dispatch("r", 0, "s", pack_tokens(tokens), SamplingParams(stop=("a",), seed=3), 5)
    times = Tokens("r", 0, 4, pack_tokens(tokens), pack_times(np.array([1, 2, 2**60])))
    for message in (dispatch, times):
        again = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=Message)
        assert again == message
    assert unpack_tokens(dispatch.tokens).tolist() == tokens.tolist()
    assert unpack_times(times.times_ns).tolist() == [1, 2, 2**60]


def test_an_int_buffer_grows_and_forgets():
    buffer = IntBuffer(np.array([1, 2]))
    for i in range(100):
        buffer.append(i)
    buffer.extend(np.arange(50))
    assert len(buffer) == 152 and buffer.view[2:102].tolist() == list(range(100))
    buffer.truncate(2)
    buffer.append(9)
    assert buffer.view.tolist() == [1, 2, 9] and buffer.view.flags.c_contiguous


def test_a_requests_own_seed_wins_over_the_one_drawn_for_it():
    prompt = np.arange(3, dtype=np.int32)
    assert Request("r", prompt, SamplingParams(seed=5), seed=9).seed == 5
    assert Request("r", prompt, SamplingParams(), seed=9).seed == 9


def test_drawn_seeds_differ_by_engine_seed_and_request():
    seeds = {drawn_seed(s, r) for s in (0, 1) for r in ("a", "b")}
    assert len(seeds) == 4 and all(0 <= s < 2**63 for s in seeds)
