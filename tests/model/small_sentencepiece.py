"""A sentencepiece-like tokenizer of few pieces: as a transformers object, as GGUF metadata, and as plain search."""

import itertools
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

SPACE = "\u2581"
BYTES = [f"<0x{value:02X}>" for value in range(256)]
WORDS = [
    f"{SPACE}t",
    "he",
    f"{SPACE}the",
    "at",
    f"{SPACE}c",
    f"{SPACE}cat",
    "s",
    "sat",
    "on",
    "cat",
    f"{SPACE}the{SPACE}cat",
]
LETTERS = [SPACE, *"abcdefghijklmnopqrstuvwxyz"]
SPECIAL_AND_BYTES = ["<unk>", "<s>", "</s>", *BYTES]
PIECES = [*SPECIAL_AND_BYTES, *dict.fromkeys([*WORDS, *LETTERS])]
SCORES = [0.0] * 259 + [-float(rank) for rank in range(len(PIECES) - 259)]
IDS = {piece: token_id for token_id, piece in enumerate(PIECES)}


def metadata() -> dict[str, Any]:
    """What a GGUF file says of this tokenizer."""
    return {
        "model": "llama",
        "tokens": PIECES,
        "scores": SCORES,
        "token_type": [2, 3, 3] + [6] * 256 + [1] * (len(PIECES) - 259),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


def search(text: str) -> list[int]:
    """Sentencepiece BPE by definition: of all adjacent pairs merge the one whose piece scores best, leftmost first."""
    parts = list((" " + text).replace(" ", SPACE))
    while True:
        pairs = [(-SCORES[IDS[a + b]], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in IDS]
        if not pairs:
            break
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    ids = [[IDS[part]] if part in IDS else [IDS[BYTES[byte]] for byte in part.encode()] for part in parts]
    return [1, *(token_id for piece in ids for token_id in piece)]


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Pieces and spaces as in `metadata`, merges just enough for whole words to appear."""
    merges = [(SPACE, "t"), ("h", "e"), (f"{SPACE}t", "he"), ("a", "t")]
    model = models.BPE(vocab=IDS, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
