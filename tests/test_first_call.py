"""What only the call of a pipeline refuses is known before a run leaves anything, for the time of one step."""

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from quantdm import Protocol, QuantDMError, get_denoiser, load_pipeline, load_protocol, look_at, run, search
from quantdm.activations.calibration import calibrate
from quantdm.pipelines.tried import _TAKEN, fewest_steps, once_computed, try_call
from quantdm.recipe import CalibrationSpec
from quantdm.runs.engines.means import seconds_per_step
from quantdm.runs.settings import FULL, QUICK, make_settings
from quantdm.schemes import Scheme
from tests.pipeline_kinds import BarePipeline, make, unet
from tests.two_denoisers import make_two_experts

ASKED: dict[str, Any] = {"version": 2, "steps": 1, "features": "pyramid"}


class Odd(BarePipeline):
    """Looks at what it is given in its call alone."""

    def __call__(self, words: str = "a", size: int = 16):
        """Refuse what it does not like, after its denoiser has worked."""
        self.unet(torch.randn(1, 3, 16, 16), torch.tensor(5))
        if size % 16:
            raise ValueError(f"size has to be divisible by 16 but is {size}")
        return super().__call__()


@pytest.fixture
def odd():
    return Odd(unet(), DDPMScheduler())


@pytest.mark.parametrize("command", [run, partial(run, minutes=5.0), partial(run, dry_run=True), search])
def test_a_call_that_is_refused_leaves_no_run_directory(odd, command, tmp_path):
    protocol = Protocol(**ASKED, call={"size": 17})
    with pytest.raises(QuantDMError, match="refused its call with size: size has to be divisible by 16 but is 17"):
        command(odd, target_bits=4.0, run_dir=tmp_path / "mine", protocol=protocol)
    assert not list(tmp_path.iterdir())


def test_a_try_takes_one_step_of_the_denoiser_and_leaves_the_pipeline_as_it_was(sd):
    denoiser, calls = get_denoiser(sd), []
    before, inner = dict(vars(denoiser)), denoiser.conv_in.register_forward_hook(lambda *_: calls.append(1))
    protocol = load_protocol("digits-sd")
    _TAKEN.pop(sd, None)  # other tests ask this pipeline, too
    try:
        for _ in range(3):  # what it took once is not asked again
            try_call(sd, copy.deepcopy(protocol), 20)
    finally:
        inner.remove()
    assert len(calls) == 1
    assert vars(denoiser).keys() == before.keys()


def test_an_output_is_given_again_for_inputs_of_the_same_form_only():
    layer = torch.nn.Linear(2, 2)
    with once_computed({"layer": layer}) as called:
        first, wide = layer(torch.zeros(1, 2)), layer(torch.zeros(3, 2))
        assert layer(torch.ones(1, 2)) is first
        assert wide.shape == (3, 2)
    assert called == {"layer": 3}
    assert not torch.equal(layer(torch.ones(1, 2)), first)


def test_a_picture_that_is_changed_a_little_is_measured_with_as_many_steps_as_it_takes():
    pipe, protocol = make("image-to-image")
    call = {**protocol.call, "strength": 0.15}
    little = Protocol(**protocol.model_copy(update={"steps": 20, "call": call}).model_dump())
    assert fewest_steps(pipe, little, 4) == 8  # of 4 steps nothing is left, of 8 one
    assert fewest_steps(pipe, little, 20) == 20
    assert seconds_per_step(pipe, little) > 0  # the dry run refuses no more than the run
    settings = settings_of(pipe, little, QUICK)
    assert settings.label_steps == 8
    assert settings.noise_steps in (None, 8)
    assert settings_of(pipe, little, replace(QUICK, noise_steps=3)).noise_steps == 12
    every = settings_of(pipe, little, replace(QUICK, verify_steps=None))  # as many as the result has
    assert every.verify_steps is None
    assert every.steps_of_verification == little.steps


def settings_of(pipe, protocol, effort):
    return make_settings(
        look_at(pipe), target_bits=4.0, target_bytes=None, trials=30, seed=0, protocol=protocol, effort=effort,
        options=[Scheme.parse("uniform-channel-2"), Scheme.parse("uniform-channel-8")],
    )  # fmt: skip


def test_nothing_is_measured_with_more_steps_than_the_protocol_has():
    protocol = load_protocol("digits-dit").model_copy(update={"steps": 2})
    settings = settings_of(load_pipeline("digits-dit"), protocol, replace(FULL, verify_steps=4))
    assert (settings.label_steps, settings.noise_steps, settings.verify_steps) == (2, 2, 2)
    assert settings.steps_of_verification == 2


def test_a_denoiser_that_never_works_is_named_before_the_run():
    pipe = make_two_experts()
    pipe.BOUNDARY = -1
    protocol = load_protocol("digits-dit")
    with pytest.raises(QuantDMError, match="transformer_2: was never called in 1 step; raise the steps"):
        try_call(pipe, protocol, 1)
    spec = CalibrationSpec(protocol="digits-dit", images=1, steps=1)
    with pytest.raises(QuantDMError, match="transformer_2: was never called in 1 step; raise the steps"):
        calibrate(pipe, spec, {"transformer": (), "transformer_2": ()})
    whole = load_pipeline("digits-dit")
    assert fewest_steps(whole, protocol, 3) == 3
    assert fewest_steps(whole, protocol.model_copy(update={"steps": 2}), 3) == 2  # no more than is asked for
