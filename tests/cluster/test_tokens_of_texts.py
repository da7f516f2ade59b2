"""What a token of a text is where no model runs: a byte, which the report says, or a token of a model's."""

import io

import numpy as np
import pytest
from rich.console import Console
from small_tokenizers import byte_level_tokenizer, write_byte_level_gguf

from memserve import LocalCluster, load_config
from memserve.config.errors import ConfigError
from memserve.metrics.table import print_report

TEXTS = {
    "chat": ["workload=chat", "workload.num_sessions=3"],
    "agent": ["workload=agent", "workload.num_sessions=3"],
    "docqa": ["workload=docqa", "workload.num_sessions=3", "workload.document_tokens=100"],
}
RUNNERS = {"hash": [], "fillers": ["tokens=workload"]}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def gguf(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("tokenizer") / "small.gguf"
    write_byte_level_gguf(path, tokenizer, "gpt-2")
    return str(path)


def played(*words):
    system = LocalCluster(load_config(["exec=simulated", *words]))
    return system, system.run_once()


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_tokens_of_the_tokenizer_that_is_named_and_else_bytes(name, runner, gguf, tokenizer):
    (_, bytewise), (system, named) = (
        played(*TEXTS[name], *RUNNERS[runner], *words) for words in ([], [f"tokenizer={gguf}"])
    )
    assert bytewise.report["workload"]["token"] == "a byte" and "token" not in named.report["workload"]
    assert named.report["num_finished"] == named.report["num_requests"] > 0 == named.report["num_failed"]
    prompt = system._sessions[0].turns[0].tokens
    assert "".join(tokenizer.decode(prompt[:20].tolist()).split()) and prompt.max() < len(tokenizer)
    if name != "docqa":  # whose documents have so many tokens, whatever those are
        assert named.report["tokens"]["prompt"] < bytewise.report["tokens"]["prompt"]
    out = io.StringIO()
    print_report(bytewise.report, console=Console(file=out, width=120))
    assert any(line.split() == ["workload", "token", "a", "byte"] for line in out.getvalue().splitlines())


def test_answers_of_fillers_are_as_long_as_the_file_s_or_as_any_may_be(tmp_path):
    dialog = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "%s"}]}'
    path, lengths = tmp_path / "chat.jsonl", [40, 400, 900, 1600]
    path.write_text("\n".join(dialog % ("x" * length) for length in lengths))
    for length, expected in (("from_file", [40, 400, 900, 1000]), ("free", [1000] * 4)):
        words = [f"workload.path={path}", "workload.max_output_tokens=1000", f"workload.output_length={length}"]
        for runner in RUNNERS if length == "from_file" else ["fillers"]:
            _, result = played("workload=chat", *words, *RUNNERS[runner])
            assert [timeline.num_output for timeline in result.timelines] == expected


def test_answers_are_the_same_on_every_cluster(gguf):
    words = [*TEXTS["chat"], f"tokenizer={gguf}", "workload.rate=50"]
    alone = {t.request_id: t.token_ids.tolist() for t in played(*words, "index=none")[1].timelines}
    _, apart = played(*words, "cluster=1p2d", "mode=pd_caching_3")
    assert {t.request_id: t.token_ids.tolist() for t in apart.timelines} == alone
    assert np.concatenate(list(alone.values())).max() > 260


@pytest.mark.parametrize(
    ("path", "said"),
    [("/no/such/model", "tokenizer: model path '/no/such/model': no such file"), ("{bare}", "that model brings none")],
)
def test_a_tokenizer_that_is_not_there_is_refused_by_name(path, said, tmp_path):
    config = load_config(["model=tiny"]).model.random
    shape = (
        "{"
        + ", ".join(f'"{key}": {value!r}'.replace("'", '"').replace("True", "true") for key, value in config.items())
        + "}"
    )
    (tmp_path / "config.json").write_text(shape.replace('"vocab_size": 300', '"vocab_size": 200'))
    with pytest.raises(ConfigError, match=said):
        played("workload=synthetic", f"tokenizer={path.format(bare=f'random:{tmp_path}')}")
