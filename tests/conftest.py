"""Shared fixtures: everything here is real (tiny diffusers models, the embedded pipelines), nothing is mocked."""

import pytest
import torch

torch.set_num_threads(1)


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
