"""Conversations grow as token ids, templates that rewrite history are refused, and both tokenizers round-trip text."""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from small_tokenizers import CHATML, SAMPLES, byte_level_tokenizer

from memserve.model.byte_tokenizer import END, ROLES, ByteTokenizer
from memserve.model.chat_format import ChatTemplateError
from memserve.model.tokenizer import HFTokenizer, Tokenizer

LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}"
)
TRIMMED = CHATML.replace("m['content']", "m['content'] | trim")
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}" + CHATML
)
DROPS_REASONING = CHATML.replace("m['content']", "m['content'].split('</think>')[-1].lstrip('\n')")
NUMBERS_TURNS = CHATML.replace("m['content']", "m['content'] + ' ' + messages | length | string")
SYSTEM_LAST = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[U] ' }}"
    "{% if loop.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}{% endif %}"
    "{{ m['content'] + ' [/U]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + '[/A]' }}{% endif %}{% endfor %}"
)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def with_template(template: str | None) -> HFTokenizer:
    return HFTokenizer(byte_level_tokenizer(chat_template=template), name="small")


@pytest.mark.parametrize(
    "template", [CHATML, TRIMMED, DEFAULT_SYSTEM, LLAMA2], ids=["chatml", "trim", "system", "llama2"]
)
def test_a_continued_conversation_is_the_conversation_rendered_whole(template: str) -> None:
    tokenizer = with_template(template)
    space = " " if template is LLAMA2 else ""
    prompt = tokenizer.chat_prompt([user("the cat")])
    dialog = [user("the cat"), assistant("sat on"), user("the mat")]
    first = tokenizer.continue_chat(prompt, tokenizer.encode(space + "sat on"), dialog[2:])
    second = tokenizer.continue_chat(first, tokenizer.encode(space + "and ran"), [user("to them")])
    assert first.tolist() == tokenizer.chat_prompt(dialog).tolist()
    assert second.tolist() == tokenizer.chat_prompt([*dialog, assistant("and ran"), user("to them")]).tolist()
    assert first.dtype == second.dtype == np.int32


def test_an_answer_that_ended_by_itself_is_not_ended_twice() -> None:
    tokenizer = with_template(CHATML)
    end = tokenizer.eos_token_ids[0]
    line_end = tokenizer.encode("\n").tolist()
    assert tokenizer.turn_suffix.tolist() == [end, *line_end]
    assert tokenizer.close_turn(np.array([7, end], dtype=np.int32)).tolist() == line_end
    assert tokenizer.close_turn(np.array([7], dtype=np.int32)).tolist() == [end, *line_end]
    assert tokenizer.close_turn(np.array([], dtype=np.int32)).tolist() == [end, *line_end]


@pytest.mark.parametrize(
    "template", [DROPS_REASONING, NUMBERS_TURNS, SYSTEM_LAST], ids=["reasoning", "count", "system"]
)
def test_a_template_that_rewrites_history_is_refused_by_name(template: str) -> None:
    tokenizer = with_template(template)
    assert len(tokenizer.chat_prompt([user("one turn is fine")]))
    with pytest.raises(ChatTemplateError, match="chat template of small rewrites history"):
        _ = tokenizer.turn_suffix
    with pytest.raises(ChatTemplateError, match="rewrites history"):
        tokenizer.next_turn([user("more")])


def test_a_model_without_a_template_joins_turns_by_line_ends_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = with_template(None)
    prompt = tokenizer.chat_prompt([user("the cat")])
    assert "small has no chat template" in caplog.text
    assert prompt.tolist() == [1, *tokenizer.encode("the cat\n").tolist()]
    assert (
        tokenizer.decode(tokenizer.continue_chat(prompt, tokenizer.encode("sat"), [user("on")])) == "the cat\nsat\non\n"
    )


@pytest.mark.parametrize(
    "messages",
    [[], "hi", [{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": None}], {"role": "user"}, ["x"]],
    ids=str,
)
@pytest.mark.parametrize("make", [lambda: with_template(CHATML), ByteTokenizer], ids=["hf", "bytes"])
def test_malformed_messages_are_refused(make: Any, messages: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        make().chat_prompt(messages)


CALL = {"type": "function", "function": {"name": "now", "arguments": {"zone": "UTC"}}}
WITH_CALLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] %}{{ m['content'] }}{% endif %}"
    "{% for call in m['tool_calls'] %}{{ call['function']['name'] }}{{ call['function']['arguments'] | tojson }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": "Well."}], ids=["absent", "null", "text"])
def test_tool_calls_are_written_as_transformers_writes_them(content: dict[str, Any]) -> None:
    backend = byte_level_tokenizer(chat_template=WITH_CALLS)
    dialog = [{"role": "user", "content": "when?"}, {"role": "assistant", **content, "tool_calls": [CALL]},
              {"role": "tool", "content": "noon"}]  # fmt: skip
    expected = backend.apply_chat_template(dialog, tokenize=False, add_generation_prompt=True)
    prompt = HFTokenizer(backend).chat_prompt(dialog)
    assert 'now{"zone": "UTC"}' in expected and prompt.tolist() == backend.encode(expected, add_special_tokens=False)


@pytest.mark.parametrize(
    ("tokenizer", "content", "message"),
    [
        (lambda: HFTokenizer(byte_level_tokenizer(), name="plain"), {}, "the chat template of plain leaves them out"),
        (lambda: HFTokenizer(byte_level_tokenizer(), name="plain"), {"content": "Well."}, "plain leaves them out"),
        (ByteTokenizer, {}, "tool_calls: the byte tokenizer has no way"),
    ],
)
def test_tool_calls_that_would_be_left_out_are_refused(tokenizer: Any, content: Any, message: str) -> None:
    dialog = [{"role": "user", "content": "when?"}, {"role": "assistant", **content, "tool_calls": [CALL]}]
    with pytest.raises(ValueError, match=message):
        tokenizer().chat_prompt(dialog)


@pytest.mark.parametrize("calls", [{}, {"tool_calls": []}, {"tool_calls": None}])
def test_a_message_without_content_needs_tool_calls(calls: Any) -> None:
    with pytest.raises(ValueError, match="expected {'role': str, 'content': str}"):
        HFTokenizer(byte_level_tokenizer(chat_template=WITH_CALLS)).chat_prompt([{"role": "assistant", **calls}])


def test_messages_that_a_template_refuses_are_an_error_of_the_user() -> None:
    with pytest.raises(ChatTemplateError, match="small refuses these messages: only user and assistant roles"):
        with_template(LLAMA2).chat_prompt([{"role": "system", "content": "x"}])


@pytest.mark.parametrize("make", [lambda: with_template(CHATML), ByteTokenizer], ids=["hf", "bytes"])
def test_text_round_trips(make: Any) -> None:
    tokenizer: Tokenizer = make()
    for text in [*SAMPLES, ""]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        expected = (
            text if isinstance(tokenizer, ByteTokenizer) else text.replace("<|im_start|>", "").replace("<|im_end|>", "")
        )
        assert tokenizer.decode(ids) == expected
    with pytest.raises((ValueError, AttributeError)):
        tokenizer.encode(cast(str, None))


def test_the_models_end_tokens_go_before_the_tokenizers_own() -> None:
    assert HFTokenizer(byte_level_tokenizer()).eos_token_ids == (2,)
    assert HFTokenizer(byte_level_tokenizer(), (0, 2)).eos_token_ids == (0, 2)


def test_bytes_chat_is_role_text_end() -> None:
    tokenizer = ByteTokenizer()
    prompt = tokenizer.chat_prompt([{"role": "system", "content": "é"}, user("a")])
    assert prompt.tolist() == [ROLES["system"], 0xC3, 0xA9, END, ROLES["user"], 97, END, ROLES["assistant"]]
    longer = tokenizer.continue_chat(prompt, np.array([98, END], dtype=np.int32), [user("c")])
    assert longer.tolist() == [*prompt.tolist(), 98, END, ROLES["user"], 99, END, ROLES["assistant"]]
    assert tokenizer.decode(longer) == "éabc"
    assert tokenizer.decode([97, 300, 98]) == "a\ufffdb"
    with pytest.raises(
        ValueError, match="role 'tool': the byte tokenizer's chat format has system, user, assistant alone"
    ):
        tokenizer.chat_prompt([{"role": "tool", "content": "x"}])


def test_a_directory_reads_back_and_a_broken_one_is_named(tmp_path: Path) -> None:
    saved = byte_level_tokenizer()
    saved.save_pretrained(tmp_path)
    tokenizer = HFTokenizer.from_directory(tmp_path)
    assert all(tokenizer.encode(text).tolist() == saved.encode(text) for text in SAMPLES)
    whole = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    for broken in ("{", whole.replace('"type": "BPE"', '"type": "Later"')):
        (tmp_path / "tokenizer.json").write_text(broken, encoding="utf-8")
        with pytest.raises(ValueError, match=f"{tmp_path.name}: the tokenizer cannot be read: .+"):
            HFTokenizer.from_directory(tmp_path)


def test_a_config_that_transformers_cannot_read_is_said_to_be_the_tokenizer_s_trouble(tmp_path: Path) -> None:
    byte_level_tokenizer().save_pretrained(tmp_path)
    config = {"model_type": "llama", "hidden_size": 33, "num_attention_heads": 4, "head_dim": 8}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=f"{tmp_path.name}: the tokenizer cannot be read: .*hidden size"):
        HFTokenizer.from_directory(tmp_path)


def test_a_directory_s_code_is_refused_and_nobody_is_asked_to_run_it(tmp_path: Path, monkeypatch) -> None:
    byte_level_tokenizer().save_pretrained(tmp_path)
    asks = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(asks), encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda prompt="": pytest.fail(prompt))
    with pytest.raises(ValueError, match=f"{tmp_path.name}: the tokenizer cannot be read: .*custom code"):
        HFTokenizer.from_directory(tmp_path)


def test_the_story_models_tokenizer_gives_its_known_ids(stories260k: Path) -> None:
    tokenizer = HFTokenizer.from_directory(stories260k, (2,))
    assert tokenizer.encode("Once upon a time").tolist() == [1, 403, 407, 261, 378]
    assert tokenizer.decode(tokenizer.encode("Zoë said: 世界")) == "Zoë said: 世界"
