"""Streamed text joins to the whole text, never breaks a character, and ends before the first stop string."""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from small_sentencepiece import BYTES, IDS, PIECES, SPACE, SPECIAL_AND_BYTES, metadata, sentencepiece_tokenizer
from small_tokenizers import SAMPLES, byte_level_tokenizer, write_tokenizer_gguf

from memserve.model.byte_tokenizer import ByteTokenizer
from memserve.model.detokenizer import Detokenizer, StopChecker
from memserve.model.gguf_tokenizer import gguf_tokenizer
from memserve.model.gguf_weights import GGUFWeights
from memserve.model.tokenizer import HFTokenizer, Tokenizer


def from_gguf(directory: Path) -> Tokenizer:
    write_tokenizer_gguf(directory / "t.gguf", metadata())
    return gguf_tokenizer(GGUFWeights(directory / "t.gguf"))


TOKENIZERS = {
    "bytes": lambda _: ByteTokenizer(),
    "byte-level": lambda _: HFTokenizer(byte_level_tokenizer()),
    "sentencepiece": lambda _: HFTokenizer(sentencepiece_tokenizer()),
    "sentencepiece in a GGUF file": from_gguf,
}


@pytest.fixture(params=TOKENIZERS, scope="module")
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return TOKENIZERS[request.param](tmp_path_factory.mktemp("tokenizer"))


def stream(tokenizer: Tokenizer, ids: list[int], prompt: Sequence[int] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, np.array(prompt, dtype=np.int32))
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


def test_pieces_join_to_the_whole_text_and_hold_whole_characters(tokenizer: Tokenizer) -> None:
    for text in SAMPLES:
        ids = tokenizer.encode(text).tolist()
        pieces = stream(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        assert not any("\ufffd" in piece for piece in pieces)


def test_pieces_of_random_tokens_join_to_the_whole_text(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    first = len(SPECIAL_AND_BYTES) if tokenizer.vocab_size == len(PIECES) else 0
    for _ in range(30):
        ids = rng.choices(range(first, tokenizer.vocab_size), k=40)
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_prompt_and_answer_join_to_the_text_of_all_tokens_wherever_the_prompt_ends(tokenizer: Tokenizer) -> None:
    for text in (*SAMPLES, "cat 世界世界世界世界 on", "🙂🙂🙂🙂"):
        ids = tokenizer.encode(text).tolist()
        for cut in range(len(ids) + 1):
            prompt, whole = tokenizer.decode(ids[:cut]), tokenizer.decode(ids)
            if whole.startswith(prompt):
                assert prompt + "".join(stream(tokenizer, ids[cut:], ids[:cut])) == whole


def test_after_random_prompts_too(tokenizer: Tokenizer) -> None:
    rng = random.Random(3)
    first = len(SPECIAL_AND_BYTES) if tokenizer.vocab_size == len(PIECES) else 0
    for _ in range(100):
        ids = rng.choices(range(first, tokenizer.vocab_size), k=30)
        cut = rng.randrange(30)
        prompt, whole = tokenizer.decode(ids[:cut]), tokenizer.decode(ids)
        if whole.startswith(prompt):
            assert prompt + "".join(stream(tokenizer, ids[cut:], ids[:cut])) == whole


def test_a_sentencepiece_answer_keeps_the_space_of_its_first_word_unless_nothing_is_before_it() -> None:
    tokenizer = HFTokenizer(sentencepiece_tokenizer())
    the, cat, begin = IDS[f"{SPACE}the"], IDS[f"{SPACE}cat"], IDS["<s>"]
    assert stream(tokenizer, [cat, the], [begin, the]) == [" cat", " the", ""]
    assert stream(tokenizer, [cat, the], [begin, the, *[begin] * 20]) == [" cat", " the", ""]
    assert stream(tokenizer, [cat, the], [begin]) == stream(tokenizer, [cat, the]) == ["cat", " the", ""]


@pytest.mark.parametrize("before", ["", "the cat", "世界世界世界世界"])
def test_a_character_that_the_prompt_begins_comes_whole_with_its_last_byte(tokenizer: Tokenizer, before: str) -> None:
    begun, rest = as_bytes(tokenizer, "🙂"), as_bytes(tokenizer, "a")
    for cut in (1, 2, 3):
        prompt = [*tokenizer.encode(before).tolist(), *begun[:cut]]
        assert "".join(stream(tokenizer, [*begun[cut:], *rest], prompt)) == "🙂a"
        assert "".join(stream(tokenizer, rest, prompt)) == "a"


def as_bytes(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of what these tokenizers have no word for, without a space before it."""
    if tokenizer.vocab_size == len(PIECES):
        return [IDS[text]] if text in IDS else [IDS[BYTES[byte]] for byte in text.encode()]
    return tokenizer.encode(text).tolist()


def test_tokens_without_text_are_not_kept() -> None:
    tokenizer = HFTokenizer(sentencepiece_tokenizer())
    silent = next(i for i in range(tokenizer.vocab_size) if tokenizer.is_silent(i))
    detokenizer = Detokenizer(tokenizer, np.array([silent], dtype=np.int32))
    assert "".join(detokenizer.push(silent) for _ in range(50)) == "" and not detokenizer._ids


def test_a_character_comes_with_its_last_byte() -> None:
    assert stream(ByteTokenizer(), list("aé🙂".encode())) == ["a", "", "é", "", "", "", "🙂", ""]


def test_an_unfinished_character_comes_at_the_end() -> None:
    assert stream(ByteTokenizer(), list("a🙂".encode())[:-1]) == ["a", "", "", "", "\ufffd"]


def checked(stop: list[str], pieces: list[str]) -> tuple[str, bool]:
    checker = StopChecker(stop)
    text = "".join(checker.push(piece) for piece in pieces) + checker.flush()
    return text, checker.stopped


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize(
    ("stop", "text", "expected"),
    [
        (["END"], "the ENEND of it", "the EN"),
        (["END"], "the EN", None),
        (["b", "abc"], "xxabcx", "xxa"),
        (["\n\n", "\nUser:"], "one\nUse\n\nUser:", "one\nUse"),
        (["aab"], "aaaab", "aa"),
        ([], "all of it", None),
        (["x"], "x", ""),
    ],
)
def test_text_ends_before_the_first_stop_string_however_it_is_cut(
    stop: list[str], text: str, expected: str | None, size: int
) -> None:
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert checked(stop, pieces) == (text if expected is None else expected, expected is not None)


def test_text_equals_a_search_of_the_whole_for_random_cuts_and_stops() -> None:
    rng = random.Random(2)
    for _ in range(500):
        text = "".join(rng.choices("ab", k=20))
        stop = ["".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(rng.randint(1, 3))]
        cuts = [0, *sorted(rng.choices(range(21), k=4)), 20]
        pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
        first = min(((text.find(s) + len(s), text.find(s)) for s in stop if s in text), default=None)
        assert checked(stop, pieces) == (text[: first[1]] if first else text, first is not None)


def test_text_that_cannot_begin_a_stop_string_is_not_held_back() -> None:
    checker = StopChecker(["stop"])
    assert checker.push("abc st") == "abc "
    assert checker.push("ay") == "stay"
    assert checker.push("stop") == ""
    assert checker.push("more") == ""
    assert checker.stopped
