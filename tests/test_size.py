"""Bytes are those of the files: predicted before an export is written, equal afterwards, and kept under a target."""

import json
import struct
from itertools import cycle, islice

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import save_file

from quantdm import Recipe, export_pipeline, get_denoiser, list_layers, load_pipeline
from quantdm.allocation.sampling import sample_configs
from quantdm.bank.weight_bank import WeightBank
from quantdm.denoisers.analysis import trace_graph
from quantdm.hub import size as size_module
from quantdm.hub.apply import apply_recipe
from quantdm.hub.header import header_text, layer_table
from quantdm.hub.size import ExportSize, denoiser_bytes
from quantdm.modules.packed import packed_layers
from quantdm.pipelines.tensor_files import DTYPE_NAMES
from quantdm.quantizers import count_bits
from quantdm.quantizers.branches import fits_rank
from quantdm.runs.target import checked_target
from quantdm.schemes import ORIGINAL, PAPER_OPTIONS, Scheme
from quantdm.surrogates import SearchSpace

BRANCHED = Scheme.parse("kmeans-channel-3-lowrank-1")
MIXES = {
    "one scheme": ("kmeans-channel-3",),
    "all kinds": (
        "kmeans-channel-3", "uniform-channel-2", "kmeans-tensor-4", "log2-channel-5", "uniform-group16-6", None,
        "kmeans-group32-7", "uniform-tensor-8", "kmeans-channel-3-lowrank-1",
    ),
    "more than ten schemes": tuple(
        f"{method}-channel-{bits}" for method in ("kmeans", "uniform") for bits in range(2, 9)
    ),
    "nothing": (None,),
}  # fmt: skip


def mixed(model, schemes):
    """A recipe that gives the layers some schemes in turn."""
    names = [layer.name for layer in list_layers(get_denoiser(load_pipeline(model)))]
    return Recipe(model=str(model), layers=dict(zip(names, cycle(schemes), strict=False)))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("name", ["digits-dit", "digits-sd"])
def test_the_size_of_an_export_is_known_to_the_byte(name, mix, tmp_path):
    recipe = mixed(name, MIXES[mix])
    predicted = ExportSize(load_pipeline(name)).of(recipe.layers)
    folder = export_pipeline(name, recipe, tmp_path / "export")
    assert denoiser_bytes(folder, load_pipeline(folder)) == predicted


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A pipeline whose values need float32, with a module that diffusers keeps in float32 and odd shapes."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=3, attention_head_dim=4, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=7, norm_num_groups=2,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    folder = tmp_path_factory.mktemp("tiny") / "pipe"
    DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kept", [None, ["pos_embed", "proj_out_1"], ["attn1"]], ids=["none", "others", "quantized"])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_tensors_count_in_the_dtype_in_which_they_are_stored(tiny, stored, kept, tmp_path, monkeypatch):
    pipe = load_pipeline(tiny)
    with torch.no_grad():
        for part in (pipe.transformer, pipe.vae):
            for parameter in part.parameters():
                parameter.copy_(parameter.to(stored).float())
    pipe.save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(DiTTransformer2DModel, "_keep_in_fp32_modules", kept)
    recipe = mixed(tmp_path / "dense", MIXES["all kinds"])
    predicted = ExportSize(load_pipeline(tmp_path / "dense")).of(recipe.layers)
    folder = export_pipeline(tmp_path / "dense", recipe, tmp_path / "export")
    assert denoiser_bytes(folder, load_pipeline(folder)) == predicted


def test_weights_from_a_bank_give_a_file_of_the_same_size(tmp_path, tiny):
    pipe = load_pipeline(tiny)
    with torch.no_grad():
        for part in (pipe.transformer, pipe.vae):
            for parameter in part.parameters():
                parameter.copy_(parameter.bfloat16().float())
    pipe.save_pretrained(tmp_path / "dense")
    scheme = Scheme.parse("kmeans-channel-3")
    layers = list_layers(pipe.transformer)
    bank = WeightBank(tmp_path / "bank", layers, [scheme]).build(pipe.transformer)  # in float32
    recipe = Recipe(model="tiny", layers={layer.name: scheme.label for layer in layers})
    sizes = set()
    for source in (None, bank):
        folder = export_pipeline(
            tmp_path / "dense", recipe, tmp_path / f"export{len(sizes)}{source is None}", bank=source
        )
        sizes.add(denoiser_bytes(folder, load_pipeline(folder)))
    assert sizes == {ExportSize(pipe).of(recipe.layers)}


def test_every_shard_is_counted_with_its_header(tmp_path, monkeypatch):
    recipe = mixed("digits-dit", MIXES["all kinds"])
    pipe = load_pipeline("digits-dit", torch_dtype=torch.float16)
    apply_recipe(pipe, recipe, insist=True)
    pipe.transformer.save_pretrained(tmp_path / "transformer", max_shard_size="300KB")
    monkeypatch.setattr(size_module, "SHARD_SIZE", "300KB")
    files = list((tmp_path / "transformer").glob("*.safetensors"))
    assert len(files) > 3
    assert sum(path.stat().st_size for path in files) == ExportSize(load_pipeline("digits-dit")).of(recipe.layers)


def test_the_dense_denoiser_counts_as_diffusers_saves_it(tmp_path):
    pipe = load_pipeline("digits-dit", torch_dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "dense")
    assert denoiser_bytes(tmp_path / "dense", pipe) == ExportSize(load_pipeline("digits-dit")).of(None)


def test_the_order_of_dtypes_in_a_file_is_that_of_safetensors(tmp_path):
    tensors = {f"{i}é": torch.zeros(3, dtype=torch.uint8).to(dtype) for i, dtype in enumerate(DTYPE_NAMES)}
    save_file(tensors, tmp_path / "all.safetensors", metadata={"format": "pt"})
    data = (tmp_path / "all.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    del header["__metadata__"]
    assert [entry["dtype"] for entry in header.values()] == list(DTYPE_NAMES.values())
    assert size_module._file_bytes(tensors, {"format": "pt"}) == len(data)


def test_the_length_of_a_header_does_not_depend_on_its_checksums():
    model = get_denoiser(load_pipeline("digits-dit"))
    apply_recipe(model, mixed("digits-dit", ("uniform-channel-4",)), insist=True)
    table, lengths = layer_table(model), set()
    for seed in range(64):
        values = torch.randint(0, 2**32, (len(packed_layers(model)) + 5,), generator=torch.manual_seed(seed)).tolist()
        lengths.add(len(header_text(table, values[5:], values[:5])))
    assert len(lengths) == 1


@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize("name", ["digits-dit", "digits-sd"])
def test_a_target_in_bytes_is_never_exceeded_and_hardly_missed(name, stays):
    options = (*PAPER_OPTIONS, BRANCHED, ORIGINAL) if stays else PAPER_OPTIONS
    pipe = load_pipeline(name)
    denoiser = get_denoiser(pipe)
    layers, size = list_layers(denoiser), ExportSize(pipe)
    bits = torch.tensor([[count_bits(la.shape, o, la.split) for o in options] for la in layers]).numpy()
    space = SearchSpace(layers, trace_graph(denoiser), options, bits, 0.0 * bits, 0.0 * bits)
    for index, choice in enumerate(islice(sample_configs(space, 25, seed=0), 25)):
        if stays:  # of all layers, or of a few
            rng = np.random.default_rng(index)
            choice = np.where(rng.random(len(layers)) < index / 24, len(options) - 1, choice)
        config = space.config(choice)
        exact = size.of(config)
        allowed = size.bits_within(options, exact)
        assert float(space.avg_bits(choice)[0]) >= allowed  # so what has no more is no larger
        assert float(space.avg_bits(choice)[0]) - allowed < (0.03 if stays else 0.01)
    least, most = size.extremes(options)
    for target in (least, most):
        found = checked_target(layers, options, pipe, target_bits=None, target_bytes=target)
        assert found == pytest.approx(
            (space.bits.min(axis=1) if target == least else space.bits.max(axis=1)).sum() / space.num_weights.sum(),
            abs=0.01,
        )


def test_what_diffusers_keeps_in_float32_counts_where_it_stays(tiny, monkeypatch):
    monkeypatch.setattr(DiTTransformer2DModel, "_keep_in_fp32_modules", ["proj_out_1", "ff"])
    pipe = load_pipeline(tiny).to(torch.bfloat16)
    layers, size = list_layers(pipe.transformer), ExportSize(pipe)
    options = (Scheme.parse("uniform-channel-4"), BRANCHED.model_copy(update={"lowrank": 6}), ORIGINAL)
    for number in range(12):
        rng = np.random.default_rng(number)
        own = [[option for option in options if fits_rank(layer.shape, option)] for layer in layers]
        chosen = [each[rng.integers(len(each))] if number else ORIGINAL for each in own]
        bits = sum(count_bits(la.shape, scheme, la.split) for la, scheme in zip(layers, chosen, strict=True))
        labels = [None if scheme == ORIGINAL else scheme.label for scheme in chosen]
        exact = size.of(dict(zip((layer.name for layer in layers), labels, strict=True)))
        assert bits / sum(layer.num_weights for layer in layers) >= size.bits_within(options, exact)


def test_a_layer_that_no_branch_fits_may_stay(tiny):
    pipe = load_pipeline(tiny).to(torch.bfloat16)
    layers = list_layers(pipe.transformer)
    options = (BRANCHED.model_copy(update={"lowrank": 13}), ORIGINAL)
    assert not any(fits_rank(layer.shape, options[0]) for layer in layers)
    _, most = ExportSize(pipe).extremes(options)
    assert checked_target(layers, options, pipe, target_bits=None, target_bytes=most) <= 16
