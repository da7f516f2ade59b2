"""Triton's interpreter as tests use it, for pytest: `-p fast_interpreter`; for a script: `-m fast_interpreter
scripts/bench_kernels.py --dry`. Made faster for this process, and for good.

On its own it patches Triton's language anew at every call of a function, nested ones too, which takes half of its time:
a process in which all kernels are interpreted needs that once.
"""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

from triton import language as tl
from triton.runtime import interpreter


def patch_once() -> None:
    """Before a kernel runs; what a function may name is our `tl`, and `core` in Triton's own."""
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()  # of nothing, so that nothing is restored


patch_once()

if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
