"""Gradient sensitivities: the derivative that they claim to be, and that they stand for what is measured."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from quantdm import QuantDMError, Scheme, load_pipeline, look_at
from quantdm.allocation.candidates import baseline_choices
from quantdm.allocation.pruning import dominated
from quantdm.denoisers.calls import replay
from quantdm.hub.size import ExportSize
from quantdm.runs import gradients as gradients_module
from quantdm.runs.engines.local import Engine
from quantdm.runs.gradients import load_gradients, measure_gradients
from quantdm.runs.search import start_run
from quantdm.runs.settings import Effort
from quantdm.runs.stages import build_bank, measure_space
from quantdm.runs.trials import first_trials
from quantdm.schemes import ORIGINAL

BRANCHED = Scheme.parse("uniform-channel-4-lowrank-20")
OPTIONS = (Scheme.parse("uniform-channel-4"), BRANCHED, ORIGINAL)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run of digits-dit up to its search space, and its gradient scores."""
    run, subject = start_run(
        look_at(load_pipeline("digits-dit")),
        tmp_path_factory.mktemp("gradients") / "run",
        target_bits=6.0,
        options=OPTIONS,
        effort=Effort(label_images=2, label_steps=4, noise_images=4),
    )
    with Engine(run, subject, workers=1) as engine:
        space = measure_space(run, engine, subject, build_bank(run, subject))
        scores = measure_gradients(run, engine.local, space)
        yield run, engine.local, space, scores


def test_the_gradient_is_the_derivative_of_the_output(measured):
    _, evaluator, space, _ = measured
    denoiser, call = evaluator.subject.denoiser, evaluator.recorded()["transformer"][0]
    name = space.layer_names[7]
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


def test_scores_stand_for_one_layer_errors(measured):
    run, _, space, scores = measured
    stays = OPTIONS.index(ORIGINAL)
    assert (scores[:, stays] == 0).all()
    assert (scores[:, :stays] > 0).all()
    assert spearmanr(scores[:, 0], space.noise_error[:, 0]).statistic > 0.4
    assert np.array_equal(load_gradients(run, space), scores)


def test_a_layer_without_the_rank_of_an_option_is_never_given_it(measured):
    _, evaluator, space, _ = measured
    small = space.layer_index["pos_embed.proj"]  # rows of 16 weights
    option = OPTIONS.index(BRANCHED)
    assert BRANCHED.label in dominated(space)["pos_embed.proj"]
    choices = first_trials(space, 40, targets=[6.0], seed=0)
    assert option not in choices[:, small]
    assert (choices == option).any()
    assert f"baseline: {BRANCHED.label}" not in baseline_choices(space, 6.0)
    with pytest.raises(QuantDMError, match=f"no option {BRANCHED.label}"):
        evaluator.bank.get("pos_embed.proj", BRANCHED)
    size = ExportSize(evaluator.subject.pipe)
    least, most = size.extremes(OPTIONS)
    assert least < size.of(space.config(choices[-1])) < most
