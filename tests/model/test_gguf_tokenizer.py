"""The tokenizer in a GGUF file gives the ids of the one it was written from; unknown word rules are refused."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import small_sentencepiece
from small_tokenizers import CHATML, SAMPLES, SPECIAL, byte_level_tokenizer, write_byte_level_gguf, write_tokenizer_gguf
from transformers import AutoTokenizer

from memserve.model.gguf_tokenizer import WORD_RULES, gguf_tokenizer
from memserve.model.gguf_weights import GGUFWeights
from memserve.model.model_path import open_model
from memserve.model.tokenizer import HFTokenizer


def read(path: Path) -> HFTokenizer:
    return gguf_tokenizer(GGUFWeights(path))


@pytest.mark.parametrize("rule", WORD_RULES)
def test_byte_level_ids_and_chat_equal_those_of_the_original(tmp_path: Path, rule: str) -> None:
    original = byte_level_tokenizer(rule)
    write_byte_level_gguf(tmp_path / "t.gguf", original, rule)
    tokenizer = read(tmp_path / "t.gguf")
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.vocab_size == len(original)
    for text in SAMPLES:
        assert tokenizer.encode(text).tolist() == original.encode(text)
        assert tokenizer.decode(original.encode(text)) == original.decode(
            original.encode(text), skip_special_tokens=True
        )
    messages = [{"role": "user", "content": "the cat"}]
    rendered = original.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert tokenizer.chat_prompt(messages).tolist() == rendered


def test_word_rules_differ_where_they_should() -> None:
    text = "It'S 2024"
    words = {rule: [word for word, _ in make().pre_tokenize_str(text)] for rule, make in WORD_RULES.items()}
    assert words["gpt-2"] == ["It", "'", "S", "Ġ2024"]
    assert words["smollm"] == ["It", "'", "S", "Ġ", "2", "0", "2", "4"]
    assert words["llama-bpe"] == ["It", "'S", "Ġ", "202", "4"]
    assert words["qwen2"] == ["It", "'S", "Ġ", "2", "0", "2", "4"]


def test_sentencepiece_ids_equal_a_search_over_scores(tmp_path: Path) -> None:
    write_tokenizer_gguf(tmp_path / "t.gguf", small_sentencepiece.metadata())
    tokenizer = read(tmp_path / "t.gguf")
    rng = random.Random(3)
    texts = ["the cat sat on", "", "é 世界!", *("".join(rng.choices("thecats on", k=12)) for _ in range(50))]
    for text in texts[:1] + texts[2:]:
        assert tokenizer.encode(text).tolist() == small_sentencepiece.search(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("")[0] == 1


def test_the_begin_token_is_added_unless_the_file_denies_it(tmp_path: Path) -> None:
    write_tokenizer_gguf(tmp_path / "t.gguf", {**small_sentencepiece.metadata(), "add_bos_token": False})
    assert read(tmp_path / "t.gguf").encode("the")[0] != 1
    write_byte_level_gguf(tmp_path / "b.gguf", byte_level_tokenizer("smollm"), "smollm")
    assert read(tmp_path / "b.gguf").encode("the")[0] not in (0, 1, 2)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model='bert', expected 'gpt2' or 'llama'"),
        ({"model": "gpt2", "pre": "falcon"}, "tokenizer.ggml.pre='falcon', expected one of gpt-2, smollm"),
    ],
)
def test_an_unknown_tokenizer_or_word_rule_is_named(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    write_tokenizer_gguf(tmp_path / "t.gguf", {**small_sentencepiece.metadata(), **changes})
    with pytest.raises(ValueError, match=named):
        read(tmp_path / "t.gguf")


def test_the_story_models_ids_survive_the_trip_through_a_gguf_file(tmp_path: Path, stories260k: Path) -> None:
    original = AutoTokenizer.from_pretrained(stories260k)
    pieces = original.convert_ids_to_tokens(range(len(original)))
    model = json.loads((stories260k / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ")), rank)
    scores = [-float(ranks.get(piece, 1000)) for piece in pieces]
    changes = {"tokens": pieces, "scores": scores, "token_type": [2, 3, 3] + [1] * (len(pieces) - 3)}
    write_tokenizer_gguf(tmp_path / "t.gguf", {**small_sentencepiece.metadata(), **changes})
    tokenizer = read(tmp_path / "t.gguf")
    for text in [s for s in SAMPLES if "<|" not in s] + ["Once upon a time, there was a little girl named Lily."]:
        assert tokenizer.encode(text).tolist() == original.encode(text)


def test_a_template_in_the_file_closes_turns(tmp_path: Path) -> None:
    write_byte_level_gguf(tmp_path / "t.gguf", byte_level_tokenizer(chat_template=CHATML), "gpt-2")
    tokenizer = read(tmp_path / "t.gguf")
    assert tokenizer.turn_suffix.tolist() == [SPECIAL.index("<|im_end|>"), *tokenizer.encode("\n").tolist()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": "abc"}, r"tokens='abc', expected a list"),
        ({"scores": [1.0, 2.0]}, r"2 tokenizer\.ggml\.scores, expected one for each of"),
        ({"token_type": 3}, r"token_type=3, expected a list"),
        ({"bos_token_id": 9999}, r"bos_token_id=9999, expected 0 to "),
        ({"unknown_token_id": 9999}, r"unknown_token_id=9999, expected 0 to "),
    ],
)
def test_metadata_that_is_none_of_a_tokenizer_is_named(tmp_path: Path, changes: Any, message: str) -> None:
    write_tokenizer_gguf(tmp_path / "t.gguf", {**small_sentencepiece.metadata(), **changes})
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "t.gguf")


@pytest.mark.parametrize(("merges", "message"), [("a b", "merges='a b', expected a list"), (["a zz"], "has 'a zz'")])
def test_merges_of_what_are_no_tokens_are_named(tmp_path: Path, merges: Any, message: str) -> None:
    metadata = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "merges": merges}
    write_tokenizer_gguf(tmp_path / "t.gguf", metadata)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "t.gguf")


def test_smollm2_gives_its_known_ids_and_chat_format(smollm2_path: str) -> None:
    tokenizer = open_model(smollm2_path).tokenizer
    assert tokenizer is not None
    assert tokenizer.encode("Hello world 2024").tolist() == [19556, 905, 216, 34, 32, 34, 36]
    prompt = tokenizer.chat_prompt([{"role": "system", "content": "x"}, {"role": "user", "content": "hi"}])
    assert prompt.tolist() == [1, 9690, 198, 104, 2, 198, 1, 4093, 198, 6004, 2, 198, 1, 520, 9531, 198]
    assert tokenizer.turn_suffix.tolist() == [2, 198]
    assert tokenizer.eos_token_ids == (2,)
