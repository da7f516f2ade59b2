"""Triton's interpreter as tests use it, for pytest: `-p mended_interpreter`; for a script: `-m mended_interpreter
scripts/bench_kernels.py --dry`. Mended for this process, and for good.

On its own it multiplies bfloat16 as the integers that hold its bits; here it is widened first, which changes no
product. And it patches Triton's language anew at every call of a function, nested ones too, which takes half of its
time: a process in which all kernels are interpreted needs that once.
"""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from triton import language as tl
from triton.runtime import interpreter


def widen_bfloat16_products() -> None:
    product = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.cast_impl(x, tl.float32) for x in (a, b))
        return product(self, a, b, *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def patch_once() -> None:
    """Before a kernel runs; what a function may name is our `tl`, and `core` in Triton's own."""
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()  # of nothing, so that nothing is restored


widen_bfloat16_products()
patch_once()

if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
