"""The tokenizer inside a GGUF file, rebuilt as a fast tokenizer of transformers. Knows no tensor.

A GGUF file keeps the vocabulary, the merges or scores, and the *name* of the rule that splits text into words; the
rule itself is known to llama.cpp, and to the table below. A rule that is not in it is refused: text split in another
way would give other tokens, and nobody would notice.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from memserve.model.gguf_weights import GGUFWeights
from memserve.model.tokenizer import HFTokenizer

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
_SPACE = "\u2581"  # sentencepiece's space
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2_SPLIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST


def _gpt2_words() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _words(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


WORD_RULES: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {  # tokenizer.ggml.pre -> how text is split
    "gpt-2": _gpt2_words,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_words()]),
    "llama-bpe": lambda: _words(_LLAMA3_SPLIT),
    "llama3": lambda: _words(_LLAMA3_SPLIT),
    "qwen2": lambda: _words(_QWEN2_SPLIT),
    "deepseek-r1-qwen": lambda: _words(_QWEN2_SPLIT),
}
_BEGINS_BY_DEFAULT = (
    "llama-bpe",
    "llama3",
)  # their prompts begin with the begin-of-sequence token unless a file denies


def gguf_tokenizer(file: GGUFWeights) -> HFTokenizer:
    """The tokenizer and chat template of a GGUF file.

    Raises ValueError naming the tokenizer model or the word rule (`tokenizer.ggml.pre`) that is not known.
    """
    kind = file.metadata("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"{file.path}: tokenizer.ggml.model={kind!r}, expected 'gpt2' or 'llama'")
    tokens: list[str] = _list(file, "tokens")
    backend = _byte_level(file, tokens) if kind == "gpt2" else _sentencepiece(file, tokens)
    _add_whole_tokens(backend, tokens, _list(file, "token_type", []))
    rule = file.metadata("tokenizer.ggml.pre")
    bos = _token_id(file, "bos", tokens)
    begins = file.metadata("tokenizer.ggml.add_bos_token", kind == "llama" or rule in _BEGINS_BY_DEFAULT)
    if begins and bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    return HFTokenizer(_wrap(file, backend, tokens), file.config.eos_token_ids, str(file.path))


def _wrap(file: GGUFWeights, backend: tokenizers.Tokenizer, tokens: list[str]) -> Any:
    import transformers  # noqa: PLC0415  # takes a second, which nobody without such a file should spend

    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = _token_id(file, key, tokens)
        special[f"{name}_token"] = None if token_id is None else tokens[token_id]
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **special
    )
    wrapped.chat_template = file.metadata("tokenizer.chat_template")
    return wrapped


def _list(file: GGUFWeights, key: str, default: list[Any] | None = None) -> list[Any]:
    value = file.metadata(f"tokenizer.ggml.{key}", default)
    if not isinstance(value, list):
        raise ValueError(f"{file.path}: tokenizer.ggml.{key}={value!r}, expected a list")
    return value


def _token_id(file: GGUFWeights, name: str, tokens: Sequence[str]) -> int | None:
    """The special token of a name; None where the file has none."""
    value = file.metadata(f"tokenizer.ggml.{name}_token_id")
    if value is not None and (not isinstance(value, int) or not 0 <= value < len(tokens)):
        raise ValueError(f"{file.path}: tokenizer.ggml.{name}_token_id={value!r}, expected 0 to {len(tokens) - 1}")
    return value


def _byte_level(file: GGUFWeights, tokens: list[str]) -> tokenizers.Tokenizer:
    """Byte-level BPE of GPT-2's kind: words by the file's rule, then merges in the file's order."""
    rule = file.metadata("tokenizer.ggml.pre")
    if rule not in WORD_RULES:
        raise ValueError(f"{file.path}: tokenizer.ggml.pre={rule!r}, expected one of {', '.join(WORD_RULES)}")
    vocab = _ids(tokens)
    merges = [tuple(merge.split(" ")) for merge in _list(file, "merges")]
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocab.keys():
            raise ValueError(f"{file.path}: tokenizer.ggml.merges has {' '.join(merge)!r}, expected two of its tokens")
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges="llama" in rule))
    backend.pre_tokenizer = WORD_RULES[rule]()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(file: GGUFWeights, tokens: list[str]) -> tokenizers.Tokenizer:
    """Sentencepiece BPE with bytes for what the vocabulary lacks; a piece's score says when it is merged."""
    vocab, scores = _ids(tokens), _list(file, "scores")
    if len(scores) != len(tokens):
        raise ValueError(f"{file.path}: {len(scores)} tokenizer.ggml.scores, expected one for each of {len(tokens)}")
    merges = _merges_from_scores(vocab, scores)
    unknown = tokens[_token_id(file, "unknown", tokens) or 0]
    model = models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    begins_with_space = file.metadata("tokenizer.ggml.add_space_prefix", True)
    if begins_with_space:
        spaces.insert(0, normalizers.Prepend(_SPACE))
    backend.normalizer = normalizers.Sequence(spaces)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", left=1)] if begins_with_space else steps)
    return backend


def _merges_from_scores(vocab: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best piece first and, for one piece, lowest ids first."""
    ranked = []
    for piece, token_id in vocab.items():
        for cut in range(1, len(piece)):
            left, right = vocab.get(piece[:cut]), vocab.get(piece[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[token_id], left, right, piece[:cut], piece[cut:]))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _add_whole_tokens(backend: tokenizers.Tokenizer, tokens: list[str], types: Sequence[int]) -> None:
    """Control tokens are matched whole and leave no text; user-defined ones are matched whole and do."""
    by_type: dict[int, list[str]] = {CONTROL: [], USER_DEFINED: []}
    for token, kind in zip(tokens, types, strict=False):
        if kind in by_type:
            by_type[kind].append(token)
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in by_type[CONTROL]])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in by_type[USER_DEFINED]])


def _ids(tokens: Sequence[str]) -> dict[str, int]:
    return {token: token_id for token_id, token in enumerate(tokens)}
