"""Gradient sensitivities: the derivative that they claim to be, and that they stand for what is measured."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from quantdm.denoisers.calls import replay
from quantdm.runs import gradients as gradients_module
from quantdm.runs.choose import GRADIENTS
from quantdm.runs.evaluator import Evaluator
from quantdm.runs.gradients import load_gradients, measure_gradients
from quantdm.runs.run import Run
from quantdm.runs.stages import load_space
from quantdm.schemes import ORIGINAL, Scheme


@pytest.fixture(scope="module")
def evaluator(finished) -> Evaluator:
    """That of a finished search."""
    run = Run.open(finished[0])
    return Evaluator(run, run.open_subject())


def test_the_gradient_is_the_derivative_of_the_output(evaluator):
    denoiser, call = evaluator.subject.denoiser, evaluator.recorded_calls()["transformer"][0]
    name = evaluator.subject.layers[7].name
    weight = denoiser.get_parameter(f"{name}.weight")
    wanted = weight.requires_grad
    (gradient,) = gradients_module._gradients(denoiser, call, {name: weight}, seed=3).values()
    change = 1e-3 * weight.detach() * torch.randn(weight.shape, generator=torch.manual_seed(0))
    rows = call.output[: gradients_module.ROWS]
    signs = torch.randint(0, 2, rows.shape, generator=torch.Generator().manual_seed(3)) * 2.0 - 1

    def product(step: float) -> float:
        weight.data += step * change
        try:
            return float((replay(denoiser, [call])[0][: len(rows)].double() * signs).sum() / rows.double().norm())
        finally:
            weight.data -= step * change

    assert float((gradient * change).sum()) == pytest.approx((product(1.0) - product(-1.0)) / 2, rel=0.02)
    assert weight.requires_grad == wanted


def test_scores_of_a_search_stand_for_one_layer_errors_and_have_a_candidate(evaluator):
    run = evaluator.run
    space = load_space(run)
    scores = load_gradients(run, space)
    assert scores is not None
    assert (scores > 0).all()
    assert spearmanr(scores.ravel(), space.noise_error.ravel()).statistic > 0.5
    selection = json.loads(run.path("selection.json").read_text())
    assert GRADIENTS in selection["configs"]
    before = run.path(gradients_module.GRADIENT_FILE).stat().st_mtime_ns
    assert np.array_equal(measure_gradients(run, evaluator, space), scores)
    assert run.path(gradients_module.GRADIENT_FILE).stat().st_mtime_ns == before


def test_what_no_layer_may_take_costs_no_product(evaluator):
    space = load_space(evaluator.run)
    name, gradient = space.layer_names[0], torch.ones(space.layers[0].shape)
    plain = gradients_module._products(evaluator, space, name, gradient)
    branched = Scheme.parse("uniform-channel-4-lowrank-999")
    more = np.concatenate([space.bits, space.bits[:, :2] * 2], axis=1)
    wider = type(space)(space.layers, space.graph, (*space.options, branched, ORIGINAL), more, more, more)
    found = gradients_module._products(evaluator, wider, name, gradient)
    assert np.array_equal(found[:-2], plain)
    assert found[-2] == plain.max()
    assert found[-1] == 0
