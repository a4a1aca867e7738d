"""One-layer errors from backward passes, on every kind of pipeline that is walked through."""

import numpy as np
import pytest
import torch

from quantdm.denoisers.calls import replay
from quantdm.denoisers.propagation import propagated_errors
from quantdm.metrics import relative_error
from quantdm.pipelines.generate import generate
from quantdm.pipelines.subject import look_at
from tests.walk_kinds import KINDS, make, protocol_of

SEEDS, EVERY = 12, 4  # layers that are measured as well
CERTAIN = 1e-11  # smaller errors drown in the rounding of float32
UNREACHED = {"hunyuan-dit": 4, "qwen-image": 3}  # read by an attention pooler, or of no influence on the output


@pytest.mark.parametrize("kind", KINDS)
def test_backward_passes_reach_the_layers_of_every_kind_and_tell_their_errors(kind):
    subject, protocol = look_at(make(kind)), protocol_of(kind)
    with subject.recording(subject.pipe, dict.fromkeys(subject.part_names, (0,))) as seen:
        generate(subject.pipe, protocol, [1, 2], steps=protocol.steps)
    unreached, ratios = 0, []
    for part, recording in seen.items():
        denoiser, call = subject.denoisers[part], recording.calls[0]
        names = [layer.name for layer in subject.part_layers[part]]

        def errors(name, denoiser=denoiser):
            weight = denoiser.get_parameter(f"{name}.weight").detach()
            return [1e-3 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))]

        runs = [propagated_errors(denoiser, call, names, errors, seed=seed) for seed in range(SEEDS)]
        unreached += len(names) - len(runs[0])
        for name in list(runs[0])[::EVERY]:
            weight = denoiser.get_parameter(f"{name}.weight")
            original, weight.data = weight.data, weight.data + errors(name)[0]
            measured = relative_error(replay(denoiser, [call])[0], call.output)
            weight.data = original
            if measured > CERTAIN:
                ratios.append(np.log(np.mean([run[name][0] for run in runs]) / measured))
    assert unreached == UNREACHED.get(kind, 0)
    assert ratios
    assert abs(np.mean(ratios)) < 0.35
    assert np.std(ratios) < 0.8
