"""The embedded pipelines are stock, small and good; images depend on their seeds alone."""

import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, DiTPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from diffusers.quantizers import auto as diffusers_auto
from transformers import CLIPTextModel
from transformers.quantizers import auto as transformers_auto

from quantdm import (
    QuantConfig,
    QuantDMError,
    Scheme,
    apply_recipe,
    generate,
    get_denoiser,
    list_layers,
    load_pipeline,
    load_protocol,
)
from quantdm.denoisers.calls import record_calls, replay
from quantdm.metrics import load_digit_classifier
from quantdm.modules import packed_layers
from quantdm.pipelines.embedded.digits import load_digit_images
from quantdm.pipelines.known import EMBEDDED
from quantdm.pipelines.text_memory import memoized_text_encoders
from tests.forge import edit_file, edit_json

KINDS = {"digits-dit": DiTPipeline, "digits-flow": StableDiffusion3Pipeline, "digits-sd": StableDiffusionPipeline}


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_an_embedded_pipeline_is_stock_diffusers_and_small(name, kind):
    index = json.loads((EMBEDDED / name / "model_index.json").read_text())
    absent = {part: None for part, value in index.items() if value == [None, None]}  # diffusers wants to be told
    assert type(DiffusionPipeline.from_pretrained(EMBEDDED / name, **absent)) is kind
    assert sum(f.stat().st_size for f in (EMBEDDED / name).rglob("*") if f.is_file()) <= 16e6


@pytest.mark.parametrize("name", KINDS)
def test_a_denoiser_has_the_shape_of_a_real_one(name):
    layers = list_layers(get_denoiser(load_pipeline(name)))
    assert len(layers) >= 40
    assert 2e6 <= sum(layer.num_weights for layer in layers) <= 6e6
    assert sum(layer.num_weights // layer.shape[0] >= 160 for layer in layers) > 0.9 * len(layers)


@pytest.mark.parametrize("name", KINDS)
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


@pytest.mark.parametrize("name", KINDS)
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
    with pytest.raises(QuantDMError, match=r"digits-dit, digits-flow, digits-sd"):
        load_pipeline("digits-di")
    with pytest.raises(QuantDMError, match=r"model_index\.json"):
        load_pipeline(tmp_path)


def test_a_truncated_checkpoint_is_one_clear_error(tmp_path, dit):
    dit.save_pretrained(tmp_path / "broken")
    weights = next((tmp_path / "broken" / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(QuantDMError, match=rf"{weights}: damaged or not a safetensors file"):
        load_pipeline(tmp_path / "broken")


@pytest.fixture(scope="module")
def small_sd(tmp_path_factory):
    """Return an export of digits-sd with a quantized text encoder and a quantized U-Net."""
    pipe, folder = load_pipeline("digits-sd"), tmp_path_factory.mktemp("small")
    encoder = pipe.text_encoder
    names = [name for name, module in encoder.named_modules() if isinstance(module, torch.nn.Linear)]
    apply_recipe(encoder, QuantConfig.uniform(names, Scheme.parse("uniform-channel-8")), insist=True)
    layers = [layer.name for layer in list_layers(pipe.unet)]
    apply_recipe(pipe, QuantConfig.uniform(layers, Scheme.parse("uniform-channel-4")), insist=True)
    pipe.save_pretrained(folder)
    return folder


def images_of(pipe):
    """Make two images."""
    return generate(pipe, load_protocol("digits-sd"), [1, 2], steps=2)


@pytest.fixture
def damaged_sd(small_sd, tmp_path):
    """Return a fresh copy of the export."""
    return Path(shutil.copytree(small_sd, tmp_path / "small"))


def test_a_pipeline_with_two_quantized_components_opens_through_both_doors(small_sd):
    plain, ours = DiffusionPipeline.from_pretrained(small_sd), load_pipeline(small_sd)
    plain.set_progress_bar_config(disable=True)
    for name in ("text_encoder", "unet"):
        assert len(packed_layers(getattr(ours, name))) == len(packed_layers(getattr(plain, name))) > 5
    assert torch.equal(images_of(plain), images_of(ours))


@pytest.mark.parametrize("part", ["text_encoder", "unet"])
def test_a_config_and_weights_that_disagree_on_quantization_are_one_clear_error(part, damaged_sd):
    config = damaged_sd / part / "config.json"
    good = config.read_text()
    for change in (
        lambda record: record.pop("quantization_config"),
        lambda record: record.update(quantization_config=None),
        lambda record: record["quantization_config"].update(quant_method="quantdn"),  # transformers skips what it lacks
    ):
        config.write_text(good)
        edit_json(config, change)
        with pytest.raises(QuantDMError, match=rf"{config}: its weights were quantized by quantdm, but it has no"):
            load_pipeline(damaged_sd)
    config.write_text(good)
    shutil.copytree(EMBEDDED / "digits-sd" / part, damaged_sd / part, dirs_exist_ok=True)
    config.write_text(good)
    with pytest.raises(QuantDMError, match=rf"{config}: says that quantdm quantized it, but there are no packed"):
        load_pipeline(damaged_sd)


@pytest.mark.parametrize("auto", [diffusers_auto, transformers_auto], ids=["diffusers", "transformers"])
def test_without_the_plug_in_there_is_an_error_and_no_random_weights(auto, small_sd, monkeypatch):
    for mapping in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(mapping, "quantdm")
    with pytest.raises(QuantDMError, match=r"quantdm\.register\(\)|cannot be opened"):
        load_pipeline(small_sd)


def lose(name):
    """Return a change that takes a tensor away."""
    return lambda _, tensors: tensors.pop(name)


def flip(name):
    """Return a change that flips the lowest bit of a tensor's last byte."""
    return lambda _, tensors: tensors[name].reshape(-1).view(torch.uint8)[-1].bitwise_xor_(1)


PACKED, PLAIN = "encoder.layers.0.mlp.fc1.packed", "final_layer_norm.bias"
DAMAGED_TEXT_ENCODERS = {
    "packed weight missing": (lose(PACKED), "does not fit its layer table"),
    "other tensor missing": (lose(PLAIN), "does not fit its layer table"),
    "other tensor renamed": (lambda _, t: t.update(x=t.pop(PLAIN)), f"{PLAIN}: was not in the checkpoint"),
    "bit flipped": (
        flip(PACKED),
        r"model\.safetensors: the packed weight of layer encoder\.layers\.0\.mlp\.fc1 is not",
    ),
    "wrong size": (
        lambda _, t: t.update({PACKED: t[PACKED][:-8].clone()}),
        r"fc1\.packed: got U8 \(\d+,\), expected the bytes",
    ),
    "wrong dtype": (lambda _, t: t.update({PACKED: t[PACKED].float()}), r"fc1\.packed: got F32"),
    "weights exchanged": (
        lambda _, t: t.update({PACKED: t[PACKED.replace("0", "1")], PACKED.replace("0", "1"): t[PACKED]}),
        "is not what was saved",
    ),
    "no layer table": (lambda header, _: header.pop("quantdm"), "no layer table"),
}


@pytest.mark.parametrize("damage", DAMAGED_TEXT_ENCODERS)
def test_a_damaged_text_encoder_is_one_clear_error(damage, damaged_sd):
    change, message = DAMAGED_TEXT_ENCODERS[damage]
    edit_file(damaged_sd / "text_encoder/model.safetensors", change)
    with pytest.raises(QuantDMError, match=message) as caught:
        load_pipeline(damaged_sd)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises((QuantDMError, RuntimeError)):  # transformers itself refuses other shapes
        CLIPTextModel.from_pretrained(damaged_sd / "text_encoder")


def test_a_protocol_that_does_not_fit_or_exist_is_one_clear_error(dit, tmp_path):
    with pytest.raises(QuantDMError, match=r"takes no 'prompt'.*class_labels"):
        generate(dit, load_protocol("digits-sd"), [0])
    with pytest.raises(QuantDMError, match="digits-dit, digits-flow, digits-sd"):
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
