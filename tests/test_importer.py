"""Published configurations and trials: their names become ours, and a file that asks for code is refused unexecuted."""

import os
import pickle
from itertools import cycle

import diffusers
import pytest
import torch

from quantdm import QuantDMError, load_recipe
from quantdm.denoisers.inventory import list_layers
from quantdm.hub.importer.ldm import ldm_names
from quantdm.hub.importer.plain_pickle import read_plain_pickle
from quantdm.hub.importer.published import SOURCE, import_recipe, import_trials
from quantdm.hub.quantize import average_bits
from quantdm.pipelines.skeleton import open_skeleton
from quantdm.runs.store import TrialStore
from tests.architectures import PUBLIC

OPTIONS = ("mse-3", "mse-4", "kmeans-3", "kmeans-4", "kmeans_all-3", "kmeans_all-4")
LABELS = {
    "mse-3": "uniform-channel-3",
    "mse-4": "uniform-channel-4",
    "kmeans-3": "kmeans-channel-3-fp16",
    "kmeans-4": "kmeans-channel-4-fp16",
    "kmeans_all-3": "kmeans-tensor-3",
    "kmeans_all-4": "kmeans-tensor-4",
}
# What the reference splits, and which layers it leaves out (docs/method.md, Splitting at long skips): quantizers.
REFERENCE = {
    "pixart-xl-2": (None, None, 287),
    "hunyuan-dit": ("blocks.skip_linear", "time_extra_emb.pooler", 487),
    "sdxl": ("resnets.conv1", None, 803),
    "sd-1.5": ("resnets.conv_shortcut", None, 294),
    "dit-xl-2": (None, None, 255),
}


@pytest.fixture(scope="module", params=list(REFERENCE))
def published(request):
    """The layers of a public denoiser and a configuration as the reference implementation names it."""
    name, config = PUBLIC[request.param]
    with torch.device("meta"):
        layers = list_layers(getattr(diffusers, name)(**config))
    split, left_out, _ = REFERENCE[request.param]
    theirs = (
        {ours: ldm for ldm, ours in ldm_names([layer.name for layer in layers])} if request.param == "sd-1.5" else {}
    )
    options, record = cycle(OPTIONS), {}
    for layer in layers:
        if left_out is None or left_out not in layer.op_type:
            key = f"model.{theirs.get(layer.name, layer.name)}.weight_quantizer"
            record[key] = next(options)
            if layer.op_type == split and layer.split is not None:
                record[f"{key}_0"] = record[key]
    return request.param, layers, record, theirs


def write(path, record):
    """Write a pickle file as the reference implementation does."""
    path.write_bytes(pickle.dumps(record))
    return path


def test_every_published_name_finds_its_layer(published, tmp_path):
    name, layers, record, theirs = published
    assert len(record) == REFERENCE[name][2]
    recipe = import_recipe(write(tmp_path / "config.pkl", record), layers, model=name)
    assert list(recipe.layers) == [layer.name for layer in layers]
    for layer in layers:
        option = record.get(f"model.{theirs.get(layer.name, layer.name)}.weight_quantizer")
        assert recipe.layers[layer.name] == (LABELS[option] if option else None), layer.name
    assert recipe.provenance.source == SOURCE
    assert recipe.avg_bits == pytest.approx(average_bits(layers, recipe.config), abs=1e-6)
    left_out = REFERENCE[name][1]
    assert [left_out in note for note in recipe.provenance.notes] == ([True] if left_out else [])
    assert load_recipe(recipe.save(tmp_path / "recipe.yaml")) == recipe


def test_names_of_the_ldm_code_base_are_those_of_its_published_checkpoint(published):
    name, layers, _, theirs = published
    if name != "sd-1.5":
        pytest.skip("only Stable Diffusion 1.5 was published with these names")
    assert len(theirs) == len(layers) == 282
    assert theirs["conv_in"] == "input_blocks.0.0"
    assert theirs["down_blocks.0.downsamplers.0.conv"] == "input_blocks.3.0.op"
    assert theirs["down_blocks.1.resnets.0.conv_shortcut"] == "input_blocks.4.0.skip_connection"
    assert theirs["down_blocks.3.resnets.1.time_emb_proj"] == "input_blocks.11.0.emb_layers.1"
    assert theirs["mid_block.resnets.1.conv2"] == "middle_block.2.out_layers.3"
    assert theirs["mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"] == (
        "middle_block.1.transformer_blocks.0.attn2.to_out.0"
    )
    assert theirs["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.1.conv"
    assert theirs["up_blocks.1.upsamplers.0.conv"] == "output_blocks.5.2.conv"
    assert theirs["up_blocks.3.attentions.2.proj_out"] == "output_blocks.11.1.proj_out"
    assert theirs["conv_out"] == "out.2"


def test_halves_with_two_options_take_the_wider_one_and_say_so(published, tmp_path):
    name, layers, record, _ = published
    halves = [key for key in record if key.endswith("_0")]
    if not halves:
        pytest.skip("nothing is split here")
    record = {**record, halves[0]: "mse-4", halves[0].removesuffix("_0"): "kmeans-3"}
    recipe = import_recipe(write(tmp_path / "config.pkl", record), layers, model=name)
    (note,) = [note for note in recipe.provenance.notes if "halves" in note]
    changed = note.rsplit(" ", 1)[-1]
    assert recipe.layers[changed] == "uniform-channel-4"


def test_trials_become_records_of_a_trial_store(published, tmp_path):
    _, layers, record, _ = published
    trials = [
        {
            "config": {key: [option, 200, 50, 1e-3] for key, option in {**record, next(iter(record)): o}.items()},
            "FID-GT-1k": 40.0 + i, "avg_bits": 3.6, "quantized_size": 1e8, "quantized_error": 0.2, "bops": 1.5e12,
        }
        for i, o in enumerate(OPTIONS[:3])
    ]  # fmt: skip
    found = import_trials(write(tmp_path / "quant_cache.pkl", [*trials, trials[0]]), layers)
    store = TrialStore(tmp_path / "trials")
    for key, trial in found:
        store.put(key, trial)
    assert len(store) == 3
    first = store.get(found[0][0])
    assert first is not None
    assert first["fid_gt_1k"] == 40.0
    assert first["published"]["bops"] == 1.5e12
    assert list(first["config"]) == [layer.name for layer in layers]
    assert 3 < first["avg_bits"] < 4.6


class Evil:
    """Runs a command when an ordinary unpickler reads it."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_a_file_that_asks_for_a_command_is_refused_by_name_and_not_executed(protocol, tmp_path):
    for inside in (lambda evil: evil, lambda evil: {"model.conv_in.weight_quantizer": evil}, lambda evil: [[evil]]):
        for call in (Evil(os.system, f"touch {tmp_path}/owned"), Evil(eval, f"open('{tmp_path}/owned', 'w')")):
            path = tmp_path / "config.pkl"
            path.write_bytes(pickle.dumps(inside(call), protocol=protocol))
            with pytest.raises(
                QuantDMError, match=r"asks for (posix\.system|(__)?builtin(s|__)\.eval).*nothing was executed"
            ):
                read_plain_pickle(path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.pkl"]


def nested(depth):
    """Lists that double at every level when they are copied."""
    value = ["x"]
    for _ in range(depth):
        value = [value] * 10
    return value


CYCLE: list = []
CYCLE.append(CYCLE)
REFUSED = {
    "array": (lambda: pickle.dumps({"a": torch.zeros(1).numpy()}), "asks for numpy"),
    "tensor": (lambda: pickle.dumps({"a": torch.zeros(1)}), "asks for torch"),
    "numpy number": (lambda: pickle.dumps(torch.zeros(1).numpy()[0]), "asks for numpy"),
    "set": (lambda: pickle.dumps({1, 2}), "set"),
    "bytes": (lambda: pickle.dumps(b"abc"), "bytes"),
    "complex": (lambda: pickle.dumps(1j), "complex"),
    "memo bomb": (lambda: b"\x80\x02]r\xff\xff\xff\x7f.", "memo position"),
    "huge bytearray": (lambda: b"\x80\x05\x96" + b"\xff" * 7 + b"\x0f.", "no readable pickle"),
    "long text": (lambda: b"\x80\x04\x8d" + b"\xff" * 7 + b"\x0f.", "no readable pickle"),
    "growing lists": (lambda: pickle.dumps(nested(7)), "more than"),
    "itself": (lambda: pickle.dumps(CYCLE), "nested"),
    "truncated": (lambda: pickle.dumps({"a": "b"})[:-3], "no readable pickle"),
    "text": (lambda: b"not a pickle", "no readable pickle"),
    "empty": (lambda: b"", "no readable pickle"),
    "persistent object": (lambda: b"Pthing\n.", "outside the file"),
    "extension": (lambda: b"\x82\x01.", "no readable pickle"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_anything_but_plain_data_is_one_error(name, tmp_path, monkeypatch):
    monkeypatch.setattr("quantdm.hub.importer.plain_pickle.MAX_VALUES", 100_000)
    make, expected = REFUSED[name]
    (tmp_path / "x.pkl").write_bytes(make())
    with pytest.raises(QuantDMError, match=expected):
        read_plain_pickle(tmp_path / "x.pkl")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda r: {**r, "model.conv_inn.weight_quantizer": "mse-4"}, r"no layer conv_inn; nearest: .*conv_in"),
        (lambda r: {**r, "model.conv_in.weight_quantizer": "gptq-4"}, "option 'gptq-4', expected mse, kmeans"),
        (lambda r: {**r, "model.conv_in.weight_quantizer": "mse-99"}, "option 'mse-99'"),
        (lambda r: {**r, "model.conv_in.weight_quantizer": 4}, "option 4"),
        (lambda r: {**r, "model.conv_in.weight_quantizer_0": "mse-4"}, "second half"),
        (lambda r: {k: v for k, v in r.items() if "mid_block.resnets.0.conv1" not in k}, "leaves out 1 layers"),
        (lambda r: {**r, 3: "mse-4"}, "key 3"),
        (lambda r: list(r), "a list holds trials"),
    ],
)
def test_a_configuration_that_does_not_fit_names_the_key(change, expected, tmp_path):
    layers = list_layers(open_skeleton("digits-sd"))
    record = {f"model.{layer.name}.weight_quantizer": "mse-4" for layer in layers}
    assert (
        import_recipe(write(tmp_path / "good.pkl", record), layers, model="m").layers["conv_in"] == "uniform-channel-4"
    )
    with pytest.raises(QuantDMError, match=expected):
        import_recipe(write(tmp_path / "bad.pkl", change(record)), layers, model="m")


@pytest.mark.parametrize(
    "change", [lambda t: {}, lambda t: {"config": t["config"]}, lambda t: {**t, "FID-GT-1k": "low"}]
)
def test_a_trial_without_its_figures_is_named(change, tmp_path):
    layers = list_layers(open_skeleton("digits-dit"))
    trial = {"config": {f"{layer.name}": ["mse-4", 1, 1, 0.0] for layer in layers}, "FID-GT-1k": 30.0}
    assert len(import_trials(write(tmp_path / "good.pkl", [trial]), layers)) == 1
    with pytest.raises(QuantDMError, match="trial 1"):
        import_trials(write(tmp_path / "bad.pkl", [trial, change(trial)]), layers)
