"""Shared fixtures: everything here is real (tiny diffusers models, the embedded pipelines), nothing is mocked."""

import os

# Results depend on the number of threads in their last bits: this process and those it starts all take one.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)


INTEGERS = ("test_execution.py", "test_branches.py", "test_lora.py", "test_equalisation.py")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what multiplies integers in convolutions where the processor has no right product: without VNNI."""
    from quantdm.modules.operators import conv_operator

    if item.path.name in INTEGERS and _convolves(item) and conv_operator("cpu") is None:
        pytest.skip("this processor has no integer convolution that is right")


def _convolves(item: pytest.Item) -> bool:
    name = item.name
    return (
        ("[conv" in name and "integer" in name)
        or ("[conv" in name and item.path.name == "test_execution.py")
        or name.startswith(("test_a_denoiser_runs_in_integers", "test_inputs_that_no_product_computes"))
        or (name.startswith("test_a_lora_changes_the_output") and "integer" in name)
    )


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
