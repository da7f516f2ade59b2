"""Tokenizers small enough to train in a test, as transformers objects and as GGUF files."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from tokenizers import decoders, models, trainers
from transformers import PreTrainedTokenizerFast

from memserve.model.gguf_tokenizer import WORD_RULES

TEXT = (
    "the cat sat on the mat and the other cats ran to them; that is 2024 and 1999, isn't it? "
    "Héllo wörld, naïve café. The bat's hat: they'll say (perhaps) HELLO!\n\n\tIndented   text.\r\n"
) * 4
SAMPLES = [
    "the cat sat",
    " the  other   hat ",
    "they'll say HELLO'S 20245 times\n\n\n  then\tgo",
    "世界 🙂 naïve\u00a0text",
    "<|im_start|>user\nhi<|im_end|>\n",
    "x",
    "\n",
    " ",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level_tokenizer(rule: str = "gpt-2", chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on TEXT, with words split by `rule`; ids 0, 1, 2 are SPECIAL."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges="llama" in rule))
    backend.pre_tokenizer = WORD_RULES[rule]()
    backend.decoder = decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=SPECIAL[1], eos_token=SPECIAL[2], clean_up_tokenization_spaces=False
    )
    wrapped.chat_template = chat_template
    return wrapped


def write_byte_level_gguf(path: Path, tokenizer: PreTrainedTokenizerFast, rule: str) -> None:
    """A GGUF file that holds `tokenizer` (and a model too small to run)."""
    pairs = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    metadata = {
        "model": "gpt2",
        "pre": rule,
        "tokens": tokens,
        "merges": [" ".join(pair) for pair in pairs],
        "token_type": [3 if t in SPECIAL else 1 for t in tokens],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_bos_token": False,
    }
    write_tokenizer_gguf(path, metadata, tokenizer.chat_template)


def write_tokenizer_gguf(path: Path, metadata: dict[str, Any], chat_template: str | None = None) -> None:
    """A GGUF file with the given `tokenizer.ggml.` metadata and a model of one layer without layers' weights."""
    writer = gguf.GGUFWriter(path, "llama")
    for key in ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "context_length"):
        writer.add_uint32(f"llama.{key}", 2 if key == "embedding_length" else 1)
    for key, value in metadata.items():
        name = f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    num_tokens = len(metadata.get("tokens", [0]))
    writer.add_tensor("token_embd.weight", np.zeros((num_tokens, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
