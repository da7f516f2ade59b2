"""Blame: where in a class of somebody's own an error arose. Knows no class; reads tracebacks."""

import sys
import traceback
from types import FrameType

from memserve.config.errors import ConfigError

_OURS = ("memserve", "__main__")
_LIBRARIES = {  # whose errors say what of ours or of a file was wrong
    *sys.stdlib_module_names, "gguf", "huggingface_hub", "hydra", "jinja2", "matplotlib", "msgspec", "numpy",
    "omegaconf", "rich", "safetensors", "tokenizers", "torch", "transformers", "triton", "wandb", "zmq",
}  # fmt: skip


def own_place(error: BaseException) -> str:
    """Like "Mine.choose, /home/me/mine.py:17": where code that is neither ours nor a library's was when it failed, by
    itself or in a library that it called. "" where ours failed, or found fault with what that code gave it.
    """
    cause: BaseException | None = error
    while cause is not None:
        frames = list(traceback.walk_tb(cause.__traceback__))
        last = max((i for i, (frame, _) in enumerate(frames) if _package(frame) in _OURS), default=-1)
        own = [(frame, line) for frame, line in frames[last + 1 :] if _package(frame) not in _LIBRARIES]
        if own:
            frame, line = own[-1]
            return f"{frame.f_code.co_qualname}, {frame.f_code.co_filename}:{line}"
        cause = cause.__cause__
    return ""


def told(error: BaseException) -> str:
    """An error in a line; of code that is somebody's own it says where, after the traceback on stderr. Of a constructor
    the place is enough: it refuses an option.
    """
    place = own_place(error)
    if place and not isinstance(error, ConfigError):
        traceback.print_exception(error)
    return f"error: {place}: {error}" if place else f"error: {error}"


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
