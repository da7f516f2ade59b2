"""For processes started with this folder on PYTHONPATH: the stand-in takes a GPU's place before anything else runs.

torchrun's own process asks no GPU for anything.
"""

import sys

if "torch.distributed.run" not in sys.orig_argv:
    import stand_in.plugin  # noqa: F401 # it installs the stand-in
