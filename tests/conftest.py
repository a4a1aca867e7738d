"""Shared fixtures: everything here is real (tiny diffusers models, the embedded pipelines), nothing is mocked."""

import os

# Results depend on the number of threads in their last bits: this process and those it starts all take one.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what multiplies integers in convolutions where the processor has no right product: without VNNI."""
    from quantdm.modules.operators import conv_operator

    if item.get_closest_marker("integer_convolution") is not None and conv_operator("cpu") is None:
        pytest.skip("this processor has no integer convolution that is right")


@pytest.fixture(scope="session")
def dit():
    """The embedded DiT pipeline, float32. Tests that change it must change it back."""
    from quantdm import load_pipeline

    return load_pipeline("digits-dit")


@pytest.fixture(scope="session")
def sd():
    """The embedded Stable Diffusion pipeline, float32. Tests that change it must change it back."""
    from quantdm import load_pipeline

    return load_pipeline("digits-sd")


@pytest.fixture(scope="session")
def finished(tmp_path_factory, dit):
    """A finished tiny search, in two worker processes."""
    from quantdm import get_denoiser
    from quantdm.pipelines.fingerprint import fingerprint
    from tests.tiny_search import run_search

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    before = fingerprint(get_denoiser(dit))
    recipe = run_search(folder, pipe=dit, workers=2)
    assert fingerprint(get_denoiser(dit)) == before  # the search leaves the pipeline as it was
    return folder, recipe
