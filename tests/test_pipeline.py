"""The embedded pipelines are stock, small and good; images depend on their seeds alone."""

import inspect
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, DiTPipeline, StableDiffusionPipeline

from quantdm import QuantDMError, generate, get_denoiser, list_layers, load_pipeline, load_protocol
from quantdm.denoisers.digits import load_digit_images
from quantdm.denoisers.pipeline import REFERENCE, memoized_text_encoders, record_calls, replay
from quantdm.metrics import load_digit_classifier

NAMES = ("digits-dit", "digits-sd")


@pytest.mark.parametrize(("name", "kind"), [("digits-dit", DiTPipeline), ("digits-sd", StableDiffusionPipeline)])
def test_an_embedded_pipeline_is_stock_diffusers_and_small(name, kind):
    assert type(DiffusionPipeline.from_pretrained(REFERENCE / name)) is kind
    assert sum(f.stat().st_size for f in (REFERENCE / name).rglob("*") if f.is_file()) <= 16e6


@pytest.mark.parametrize("name", NAMES)
def test_a_denoiser_has_the_shape_of_a_real_one(name):
    layers = list_layers(get_denoiser(load_pipeline(name)))
    assert len(layers) >= 40
    assert 2e6 <= sum(layer.num_weights for layer in layers) <= 6e6
    assert sum(layer.num_weights // layer.shape[0] >= 160 for layer in layers) > 0.9 * len(layers)


@pytest.mark.parametrize("name", NAMES)
def test_images_show_the_digit_that_was_asked_for(name):
    protocol = load_protocol(name)
    images = generate(load_pipeline(name), protocol, range(100), steps=10)
    assert images.shape == (100, 3, 32, 32)
    assert 0 <= images.min() <= images.max() <= 1
    said = load_digit_classifier()(images).argmax(1)
    assert (said == torch.arange(100) % 10).float().mean() >= 0.93


def test_an_image_depends_on_its_seed_and_not_on_its_batch(dit):
    protocol = load_protocol("digits-dit")
    together = generate(dit, protocol, [5, 6, 7, 8], steps=3)
    apart = torch.cat([generate(dit, protocol, [5 + i], steps=3, first=i) for i in range(4)])
    torch.testing.assert_close(together, apart, atol=2e-5, rtol=0)
    assert not torch.allclose(together[0], generate(dit, protocol, [99], steps=3)[0], atol=1e-2)


def test_generating_leaves_the_global_random_state_alone(sd):
    before = torch.random.get_rng_state()
    generate(sd, load_protocol("digits-sd"), [1], steps=2)
    assert torch.equal(before, torch.random.get_rng_state())


def test_prompts_are_encoded_once_and_images_stay_the_same(sd):
    protocol = load_protocol("digits-sd")
    plain = generate(sd, protocol, range(4), steps=2, batch_size=2)
    calls = []
    layer = next(m for m in sd.text_encoder.modules() if isinstance(m, torch.nn.Linear))
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    with memoized_text_encoders(sd):
        first = generate(sd, protocol, range(4), steps=2, batch_size=2)
        again = generate(sd, protocol, range(4), steps=2, batch_size=2)
    handle.remove()
    assert len(calls) == 2  # two batches, each once
    assert torch.equal(plain, first)
    assert torch.equal(plain, again)
    assert "forward" not in vars(sd.text_encoder)


@pytest.mark.parametrize("name", NAMES)
def test_a_replay_of_recorded_calls_is_exact(name):
    pipe = load_pipeline(name)
    with record_calls(get_denoiser(pipe), [1, 2]) as recording:
        generate(pipe, load_protocol(name), range(3), steps=4)
    assert recording.seen == 4
    assert len(recording.calls) == 2
    for call, output in zip(recording.calls, replay(get_denoiser(pipe), recording.calls), strict=True):
        assert torch.equal(call.output, output)


def test_the_split_of_the_real_digits_is_fixed_and_stratified():
    (train, train_labels), (test, test_labels) = load_digit_images("train"), load_digit_images("test")
    assert (len(train), len(test)) == (1257, 540)
    assert train.min() >= 0
    assert train.max() <= 1
    shares = [labels.bincount(minlength=10) / len(labels) for labels in (train_labels, test_labels)]
    assert (shares[0] - shares[1]).abs().max() < 0.005
    with pytest.raises(ValueError, match="'train' or 'test'"):
        load_digit_images("validation")  # type: ignore[arg-type]


def test_an_unknown_pipeline_lists_those_known(tmp_path):
    with pytest.raises(QuantDMError, match=r"digits-dit, digits-sd"):
        load_pipeline("digits-di")
    with pytest.raises(QuantDMError, match=r"model_index\.json"):
        load_pipeline(tmp_path)


def test_a_truncated_checkpoint_is_one_clear_error(tmp_path, dit):
    dit.save_pretrained(tmp_path / "broken")
    weights = next((tmp_path / "broken" / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(QuantDMError, match="cannot be opened"):
        load_pipeline(tmp_path / "broken")


def test_a_protocol_that_does_not_fit_or_exist_is_one_clear_error(dit, tmp_path):
    with pytest.raises(QuantDMError, match=r"takes no 'prompt'.*class_labels"):
        generate(dit, load_protocol("digits-sd"), [0])
    with pytest.raises(QuantDMError, match="digits-dit, digits-sd"):
        load_protocol("nothing")
    (tmp_path / "p.yaml").write_text("version: 1\nargument: noise\n")
    with pytest.raises(QuantDMError, match="argument"):
        load_protocol(tmp_path / "p.yaml")


def test_public_signatures_are_the_promised_ones():
    import quantdm

    expected = {
        "load_pipeline": ["name_or_path", "torch_dtype", "device"],
        "get_denoiser": ["pipe"],
        "quantize_weight": ["weight", "scheme"],
        "apply_correction": ["pipe", "correction"],
    }
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(quantdm, name)).parameters)[: len(parameters)] == parameters
    search = inspect.signature(quantdm.search).parameters
    assert {"pipe", "target_bits", "target_bytes", "trials", "run_dir", "seed"} <= set(search)
    assert Path(quantdm.__file__).with_name("py.typed").is_file()
