"""What an instance keeps of a request goes on as it was where another instance had it before."""

import numpy as np
import pytest
from small_sentencepiece import IDS, SPACE, sentencepiece_tokenizer

from memserve.kvcache.ticket import Arrival
from memserve.model.tokenizer import HFTokenizer
from memserve.request import Request
from memserve.sampling_params import SamplingParams
from memserve.served import adopted, stop_strings
from memserve.words import packed, read_word, request_of

THE, GAP, A, B = IDS[f"{SPACE}the"], IDS[SPACE], IDS["a"], IDS["b"]


@pytest.mark.parametrize("num_before", [0, 1, 2])
@pytest.mark.parametrize("migrates", [False, True])
def test_a_stop_string_that_begins_with_the_answer_s_first_space_is_found_wherever_it_is_handed_over(
    num_before: int, migrates: bool
) -> None:
    tokenizer, answer = HFTokenizer(sentencepiece_tokenizer()), np.array([GAP, A, B], dtype=np.int32)
    before = Request("r", np.array([THE], dtype=np.int32), SamplingParams(stop=(" ab",)), max_num_tokens=9)
    before.tokens.extend(answer[:num_before])
    word = read_word(packed(before, None, None, migrates=migrates))
    request = request_of(word)
    arrival = Arrival((1, 1), request.tokens.view[:0], request.tokens.view[:0], 0, b"", 1, 2, 3, 4)
    served = adopted(request, stop_strings(tokenizer, request), arrival, word)
    later = [served.stop_strings.ended_by(answer[i : i + 1]) for i in range(num_before, 3)]
    assert later == [False] * (len(later) - 1) + [True]
