import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pytest
import torch
import transformers
from small_sentencepiece import IDS, PIECES, SPACE, sentencepiece_tokenizer
from small_tokenizers import byte_level_tokenizer

from memserve import LLM, SamplingParams
from memserve.config.errors import ConfigError
from memserve.kvcache.eviction import LFU
from memserve.model.attention.base import Attention
from memserve.model.attention.reference import ReferenceAttention

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A random model with room for the byte tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=200, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    return f"random:{directory}"


@pytest.fixture
def llm(path):
    return LLM(path, block_size=4, num_blocks=200)


def settled(llm):
    """No request holds anything any more."""
    llm.instance.check()
    stats = llm.instance.pool.stats()
    return llm.instance.num_unfinished == 0 and stats.num_free + stats.num_evictable == stats.num_blocks


def test_prompts_come_as_text_chats_or_ids_one_or_many_and_answers_in_order(llm):
    text, chat, ids = "hello", [{"role": "user", "content": "hi"}], [1, 2, 3]
    [one] = llm.generate(text, GREEDY)
    assert one.prompt_token_ids == list(b"hello") and len(one.token_ids) == 12 and one.finish_reason == "length"
    assert [o.prompt_token_ids for o in llm.generate([ids, ids[:2]], GREEDY)] == [ids, ids[:2]]
    for array in (np.array(ids), torch.tensor(ids), torch.tensor([ids])):
        assert llm.generate(ids, GREEDY)[0].token_ids == llm.generate(array, GREEDY)[0].token_ids
    mixed = llm.generate([text, chat, ids], GREEDY)
    assert mixed[0].token_ids == one.token_ids and mixed[2].prompt_token_ids == ids
    assert mixed[1].token_ids == llm.generate(chat, GREEDY)[0].token_ids == llm.generate([chat], GREEDY)[0].token_ids
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert llm.generate(parts, GREEDY)[0].prompt_token_ids == mixed[1].prompt_token_ids
    assert llm.generate([], GREEDY) == [] and settled(llm)


def test_a_second_turn_finds_the_first_ones_blocks(llm):
    first = llm.generate("a question of some length", GREEDY)[0]
    history = [*first.prompt_token_ids, *first.token_ids]
    again = llm.generate([[*history, 7, 8, 9]], GREEDY)[0]
    assert first.num_cached == 0 and again.num_cached == (len(history) - 1) // 4 * 4


def test_streaming_gives_the_same_answers_piece_by_piece(llm):
    prompts = ["one", "two words", "three"]
    whole = llm.generate(prompts, GREEDY)
    texts, ids, outputs = [""] * 3, [[], [], []], [None] * 3
    for delta in llm.generate(prompts, GREEDY, stream=True):
        texts[delta.index] += delta.text
        ids[delta.index] += delta.token_ids
        outputs[delta.index] = delta.output or outputs[delta.index]
    assert [o.text for o in whole] == texts == [o.text for o in outputs]
    assert [o.token_ids for o in whole] == ids
    assert settled(llm)


def test_a_stream_that_nobody_reads_to_its_end_leaves_nothing_behind(llm):
    stream = llm.generate(["one", "two"], SamplingParams(max_tokens=100, ignore_eos=True), stream=True)
    next(stream)
    stream.close()
    assert settled(llm)
    assert len(llm.generate("one", GREEDY)[0].token_ids) == 12


@pytest.mark.parametrize("moment", ["receive", "schedule", "forward", "commit"])
def test_a_stream_that_the_garbage_collector_closes_in_the_midst_of_a_step_waits_for_its_end(llm, monkeypatch, moment):
    whole = llm.generate(["one", "two"], GREEDY)
    forgotten = [llm.generate("three", SamplingParams(max_tokens=100, ignore_eos=True), stream=True)]
    next(forgotten[0])
    in_midst = getattr(llm.instance, moment)

    def collects_garbage(*arguments):
        monkeypatch.setattr(llm.instance, moment, in_midst)
        result = in_midst(*arguments)
        forgotten.clear()
        return result

    monkeypatch.setattr(llm.instance, moment, collects_garbage)
    assert llm.generate(["one", "two"], GREEDY)[1].token_ids == whole[1].token_ids
    assert not forgotten and settled(llm) and not llm._heard


def test_a_stream_that_another_thread_closes_during_a_step_is_gone_when_that_step_has_ended(llm, monkeypatch):
    long = SamplingParams(max_tokens=100, ignore_eos=True)
    closed, reading = llm.generate("three", long, stream=True), llm.generate("one", GREEDY, stream=True)
    next(closed)
    forward = llm.instance.forward

    def meanwhile(batch):
        monkeypatch.undo()
        thread = threading.Thread(target=closed.close)
        thread.start()
        thread.join()  # it does not wait for the step
        return forward(batch)

    monkeypatch.setattr(llm.instance, "forward", meanwhile)
    next(reading)
    assert llm.instance.num_unfinished == 1 and not llm._unread
    assert [delta.output for delta in reading][-1] is not None and settled(llm)


def test_a_stop_token_that_the_vocabulary_does_not_have_is_refused_by_name(llm):
    with pytest.raises(ValueError, match=r"prompt 0: stop_token_ids=\[300\]: expected 0 to 299"):
        llm.generate("one", SamplingParams(stop_token_ids=(7, 300)))
    assert settled(llm)


def test_threads_that_share_it_take_turns(llm):
    prompts = [f"number {i}" for i in range(6)]
    whole = [llm.generate(prompt, GREEDY)[0].token_ids for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as threads:
        for _ in range(5):
            outputs = list(threads.map(lambda prompt: llm.generate(prompt, GREEDY)[0].token_ids, prompts))
            assert outputs == whole
    assert settled(llm)


def test_streams_that_are_open_at_once_lose_nothing_to_each_other(llm):
    prompts = ["one", "two words", "three"]
    whole = [llm.generate(prompt, GREEDY)[0] for prompt in prompts]
    streams = [llm.generate(prompt, GREEDY, stream=True) for prompt in prompts]
    abandoned = llm.generate("four", GREEDY, stream=True)
    next(abandoned)
    texts, outputs = [""] * 3, [None] * 3
    for round_number in range(13):
        for i, stream in enumerate(streams):
            delta = next(stream)
            texts[i], outputs[i] = texts[i] + delta.text, delta.output
        if round_number == 3:
            abandoned.close()
            assert llm.generate(prompts, GREEDY) == llm.generate(prompts, GREEDY)
    assert texts == [o.text for o in whole] and [o.token_ids for o in outputs] == [o.token_ids for o in whole]
    assert settled(llm) and not llm._heard


def test_stop_strings_end_the_text_and_never_show(llm):
    full = llm.generate("tell me", SamplingParams(max_tokens=60, ignore_eos=True))[0]
    stop = full.text[5:8]
    cut = llm.generate("tell me", SamplingParams(max_tokens=60, ignore_eos=True, stop=(stop,)))[0]
    assert cut.text == full.text[: full.text.find(stop)] and cut.finish_reason == "stop"
    assert cut.token_ids == full.token_ids[: len(cut.token_ids)] and len(cut.token_ids) < 60
    assert settled(llm)


@pytest.fixture
def in_sentencepiece(tmp_path, path):
    directory = tmp_path / "with_sentencepiece"
    shutil.copytree(path.removeprefix("random:"), directory)
    sentencepiece_tokenizer().save_pretrained(directory)
    return LLM(directory, block_size=4, num_blocks=400)


def test_a_token_that_ends_the_answer_has_no_part_in_its_text(llm):
    """As in vLLM and SGLang, and as for stop strings."""
    full = llm.generate("tell me", GREEDY)[0].token_ids
    last = next(i for i, token in enumerate(full) if 1 <= i < full.index(token) + 1 and llm.tokenizer.decode([token]))
    params = SamplingParams(max_tokens=12, ignore_eos=True, stop_token_ids=(full[last],))
    cut, pieces = llm.generate("tell me", params)[0], [*llm.generate("tell me", params, stream=True)]
    assert (cut.token_ids, cut.finish_reason) == (full[: last + 1], "stop")
    short = llm.generate("tell me", SamplingParams(max_tokens=last, ignore_eos=True))[0]
    assert cut.text == short.text == "".join(piece.text for piece in pieces)


def test_a_sentencepiece_answer_begins_with_its_space_which_a_stop_string_may_ask_for(in_sentencepiece):
    llm, the = in_sentencepiece, IDS[f"{SPACE}the"]
    few = SamplingParams(max_tokens=4, temperature=5.0, ignore_eos=True)
    drawn = [msgspec.structs.replace(few, seed=seed) for seed in range(200)]
    outputs = llm.generate([[1, the]] * len(drawn), drawn)
    for output in outputs:
        whole = llm.tokenizer.decode([1, the, *output.token_ids])
        assert whole == "the" + output.text or "\ufffd" in whole
    words = {token_id for piece, token_id in IDS.items() if piece.startswith(SPACE)}
    spaced = [i for i, output in enumerate(outputs) if output.token_ids[0] in words]
    assert len(spaced) > 1
    for i in spaced:
        stop = PIECES[outputs[i].token_ids[0]].replace(SPACE, " ")
        [cut] = llm.generate([[1, the]], msgspec.structs.replace(drawn[i], stop=(stop,)))
        assert outputs[i].text.startswith(stop) and cut.finish_reason == "stop"
        assert cut.text == "" and cut.token_ids == outputs[i].token_ids[:1]


def test_a_completion_of_a_real_model_goes_on_after_the_prompt_s_last_word(stories260k):
    llm = LLM(str(stories260k))
    assert llm.generate("Once upon", SamplingParams(max_tokens=8))[0].text == " a time, there was a little g"
    [cut] = llm.generate("Once upon", SamplingParams(max_tokens=8, stop=(" a", " little", " park")))
    assert cut.finish_reason == "stop" and len(cut.token_ids) == 1
    deltas = [*llm.generate("Once upon", SamplingParams(max_tokens=8), stream=True)]
    assert "".join(delta.text for delta in deltas) == deltas[-1].output.text == " a time, there was a little g"


def test_a_special_token_as_a_stop_string_ends_the_answer_at_that_token(tmp_path, path):
    directory = tmp_path / "with_tokenizer"
    shutil.copytree(path.removeprefix("random:"), directory)
    byte_level_tokenizer().save_pretrained(directory)
    llm = LLM(directory, block_size=4, num_blocks=200)
    params = SamplingParams(max_tokens=150, temperature=5.0, seed=1, ignore_eos=True)
    full = llm.generate([5, 6, 7], params)[0]
    special = llm.tokenizer.special_tokens
    end = next(token for token in full.token_ids if token in special.values())
    word = next(text for text, number in special.items() if number == end)
    cut = llm.generate([5, 6, 7], msgspec.structs.replace(params, stop=(word,)))[0]
    assert cut.token_ids == full.token_ids[: full.token_ids.index(end) + 1] and cut.finish_reason == "stop"
    assert word not in cut.text and full.text.startswith(cut.text)
    with pytest.raises(ValueError, match=r"stop='x<\|im_end\|>' has the special token '<\|im_end\|>' in it.*=\[2\]"):
        llm.generate([5, 6, 7], SamplingParams(stop="x<|im_end|>"))


def test_a_seeded_sample_does_not_depend_on_the_batch_or_the_cache(llm):
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=5, max_tokens=12, ignore_eos=True)
    alone = llm.generate("a prompt to sample from", params)[0].token_ids
    prompts = ["other", "a prompt to sample from", "yet another one"]
    assert llm.generate(prompts, params)[1].token_ids == alone
    other = SamplingParams(temperature=1.0, top_p=0.9, seed=6, max_tokens=12, ignore_eos=True)
    assert llm.generate(prompts[1], other)[0].token_ids != alone


def test_greedy_answers_with_a_repetition_penalty_are_those_of_transformers(path, tmp_path):
    directory = tmp_path / "with_tokenizer"
    shutil.copytree(path.removeprefix("random:"), directory)
    byte_level_tokenizer().save_pretrained(directory)
    llm, model = LLM(directory, block_size=4, num_blocks=200), transformers.LlamaForCausalLM.from_pretrained(directory)
    prompts = [list(b"one and one and one and one"), list(b"another prompt"), [7] * 40]
    params = SamplingParams(max_tokens=60, repetition_penalty=1.3, ignore_eos=True)
    how = {"max_new_tokens": 60, "do_sample": False, "repetition_penalty": 1.3, "eos_token_id": None, "pad_token_id": 0}
    expected = [model.generate(torch.tensor([prompt]), **how)[0, len(prompt) :].tolist() for prompt in prompts]
    for _ in range(2):  # the second time from the cache
        assert [output.token_ids for output in llm.generate(prompts, params)] == expected
    without = msgspec.structs.replace(params, repetition_penalty=1.0)
    assert [output.token_ids for output in llm.generate(prompts, without)] != expected


def test_a_frequency_penalty_spreads_an_answer_over_more_tokens(llm):
    params = SamplingParams(max_tokens=150, ignore_eos=True, frequency_penalty=2.0)
    [spread] = llm.generate([3, 4, 5], params)
    [plain] = llm.generate([3, 4, 5], msgspec.structs.replace(params, frequency_penalty=0.0))
    assert len(set(spread.token_ids)) > 2 * len(set(plain.token_ids))


def test_logprobs_name_every_token_and_the_likeliest(llm):
    output = llm.generate("hello", SamplingParams(max_tokens=5, ignore_eos=True, logprobs=3))[0]
    assert [entry.token_id for entry in output.logprobs] == output.token_ids
    for entry in output.logprobs:
        assert len(entry.top) == 3 and entry.logprob == max(entry.top.values()) < 0
    assert llm.generate("hello", GREEDY)[0].logprobs is None


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", "prompt 0: empty prompt"),
        (["fine", []], "prompt 1: empty prompt"),
        (["fine", [1, 2, 300]], "prompt 1: prompt token 300: expected 0 to 299"),
        ([[1, -2]], "prompt 0: prompt token -2"),
        ([[1.5, 2]], "expected a string, chat messages or a list of token ids"),
        ("x" * 200, "prompt 0: prompt of 200 tokens: the context of 200"),
        ([[{"role": "cook", "content": "x"}]], "role"),
        ([[2**32 + 5]], "prompt 0: prompt token 4294967301: expected 0 to 299"),
        ({"role": "user", "content": "x"}, "expected a string, a chat"),
        (b"abc", "expected a string, a chat"),
        (np.array(3), "expected a string, a chat"),
        (None, "prompts=None: expected"),
        (["fine", "\ud800"], r"prompt 1: text='\\ud800': expected what UTF-8 can hold"),
        (["fine", [True]], r"prompt 1: \[True\]: expected a string"),
        ([[[1, 2], [3]]], r"prompt 0: \[\[1, 2\], \[3\]\]: expected"),
    ],
)
def test_a_bad_prompt_is_named_before_any_is_served(llm, prompts, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, GREEDY)
    assert settled(llm) and llm.instance.scheduler.counts.steps == 0


def test_a_request_that_can_never_fit_the_pool_is_refused_with_its_numbers(path):
    llm = LLM(path, block_size=4, num_blocks=5)
    with pytest.raises(ValueError, match="need 6 blocks of 4 tokens: the pool has 5"):
        llm.generate("0123456789", GREEDY)


def test_params_are_one_for_all_or_one_for_each(llm):
    each = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (2, 3)]
    assert [len(o.token_ids) for o in llm.generate(["a", "b"], each)] == [2, 3]
    with pytest.raises(ValueError, match="2 sampling params for 3 prompts"):
        llm.generate(["a", "b", "c"], each)
    for wrong in ({"max_tokens": 3}, [None], 5):
        with pytest.raises(ValueError, match="params=.*expected SamplingParams"):
            llm.generate("a", wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocksize": 4}, "LLM option 'blocksize': expected one of"),
        ({"block_size": 0}, "block_size=0"),
        ({"index": "tree"}, "tree"),
        ({"dtype": "int4"}, "int4"),
        ({"num_blocks": "many"}, "many"),
        ({"max_context": 4000}, "context"),
    ],
)
def test_unknown_or_bad_options_are_refused_by_name(path, options, message):
    with pytest.raises(ValueError, match=message):
        LLM(path, **options)


def test_a_path_may_hold_any_character(tmp_path, path):
    directory = tmp_path / "it's a, {model}=x"
    directory.mkdir()
    with pytest.raises(ValueError, match="config.json"):
        LLM(directory)
    with pytest.raises(ConfigError):
        LLM(path, seed=-3)


class Unmixed(Attention):
    """Every token attends to nothing."""

    def attend(self, layer, q_THD):
        return torch.zeros_like(q_THD)


class Formula(ReferenceAttention):
    """Ours, under a name of one's own."""


def test_an_attention_of_ones_own_is_named_by_its_class_and_is_what_computes(path, llm):
    prompt = "a question of some length"
    ours, same, other = (
        model.generate(prompt, GREEDY)[0].token_ids
        for model in (llm, *(LLM(path, attention=f"{__name__}.{kind.__name__}") for kind in (Formula, Unmixed)))
    )
    assert ours == same != other


class Rarest(LFU):
    """scale: changes nothing."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def key(self, node):
        return (node.num_uses * self.scale,)


def test_classes_of_ones_own_are_given_as_nodes_with_their_options(path):
    model = LLM(path, eviction={"_target_": f"{__name__}.Rarest", "scale": 0.5}, block_size=4, num_blocks=8)
    assert len(model.generate([[i] * 9 for i in range(1, 6)], GREEDY)) == 5
    with pytest.raises(ConfigError, match="eviction.scales=1: .*Rarest takes scale"):
        LLM(path, eviction={"_target_": f"{__name__}.Rarest", "scales": 1})


def test_the_most_urgent_prompt_is_answered_first_and_with_the_same_tokens(path):
    llm = LLM(path, block_size=4, num_blocks=200, queue="priority", max_running=1)
    prompts = [[i, i + 1, i + 2] for i in range(4)]
    deltas = llm.generate(prompts, GREEDY, stream=True, priority=[2, 0, -1, 2])
    ends = [delta.index for delta in deltas if delta.output is not None]
    assert ends == [2, 1, 0, 3]
    plain = [output.token_ids for output in llm.generate(prompts, GREEDY)]
    assert [output.token_ids for output in llm.generate(prompts, GREEDY, priority=np.arange(4))] == plain
    assert [output.token_ids for output in llm.generate(prompts, GREEDY, priority=5)] == plain and settled(llm)


@pytest.mark.parametrize(
    ("priority", "said"),
    [
        (2**31, r"priority=2147483648: expected an integer in \[-2\*\*31, 2\*\*31\)"),
        ("low", r"priority='low': expected an integer"),
        ([0, True], r"priority of prompt 1=True: expected an integer"),
        ([1], r"1 priorities for 2 prompts: expected one, or one for each"),
        (None, r"priority=None: expected an integer"),
    ],
)
def test_a_priority_that_is_none_is_refused_by_name(path, priority, said):
    with pytest.raises(ValueError, match=said):
        LLM(path, queue="priority").generate([[1, 2], [3]], GREEDY, priority=priority)


def test_a_priority_that_the_queue_would_not_look_at_is_refused(llm):
    with pytest.raises(ValueError, match=r"priority=1 contradicts queue=FCFS, .*: expected 0, or queue=\"priority\""):
        llm.generate([1, 2], GREEDY, priority=1)
    assert len(llm.generate([1, 2], GREEDY, priority=0)) == 1
