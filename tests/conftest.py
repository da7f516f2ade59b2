"""Fixtures that several test directories need."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tiny products: a second thread only waits, and for long where cores are shared

SHARED = Path(__file__).resolve().parents[2] / "shared"  # traces and small models that lie beside a checkout


def shared_path(*parts: str) -> Path | None:
    """A file or directory of the folder `shared` beside the checkout, or None where there is none."""
    path = SHARED.joinpath(*parts)
    return path if path.exists() else None


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """A 260K-parameter Llama in Hugging Face layout. What is tested with it has a stand-alone counterpart."""
    path = shared_path("models", "stories260K")
    if path is None:
        pytest.skip("../shared/models/stories260K is not beside this checkout")
    return path


@pytest.fixture(scope="session")
def shared_workloads() -> Path:
    """Traces and conversation files. What is tested with them has a stand-alone counterpart."""
    path = shared_path("workloads")
    if path is None:
        pytest.skip("../shared/workloads is not beside this checkout")
    return path
