"""For processes started with this folder on PYTHONPATH: the stand-in takes a GPU's place before anything else runs."""

import stand_in.plugin  # noqa: F401 # it installs the stand-in
