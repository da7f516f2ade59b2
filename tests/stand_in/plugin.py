"""For pytest: `-p stand_in.plugin` puts the stand-in in the place of a GPU before any test is collected."""

import fast_interpreter  # noqa: F401 # its import makes the interpreter faster, as for the tests of kernels
from triton.runtime.interpreter import InterpreterOptions, interpreter_builder

from memserve.model import captured_decode
from stand_in import cuda_api, ipc
from stand_in.gpu import StandInGpu

gpu = StandInGpu()
cuda_api.install(gpu)
ipc.install(gpu)
captured_decode.BUCKETS = (2, 6)  # each is recorded for every runner, and the interpreter is slow
interpreter_builder.options = InterpreterOptions(sanitize_overflow=False)  # that is watched in tests/model/kernels/
