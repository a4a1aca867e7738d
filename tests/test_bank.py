"""The bank: streamed, content-addressed, resumable, the same for any number of workers; swaps move pointers."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantdm import QuantDMError, Scheme, get_denoiser, list_layers, load_protocol
from quantdm.activations.moments import JointMoments, gather_moments
from quantdm.bank import layer_build, weight_bank
from quantdm.bank import processes as bank_processes
from quantdm.bank.weight_bank import WeightBank
from quantdm.files import load_tensors
from quantdm.pipelines.generate import calibration_calls
from quantdm.quantizers import Moments, count_bits
from tests.programs import ROOT, environment

OPTIONS = tuple(Scheme.parse(label) for label in ("uniform-channel-3", "kmeans-channel-4", "kmeans-tensor-3"))


@pytest.fixture(scope="module")
def layers(dit):
    return list_layers(get_denoiser(dit))[:12]


@pytest.fixture(scope="module")
def built(dit, layers, tmp_path_factory):
    return WeightBank(tmp_path_factory.mktemp("bank"), layers, OPTIONS).build(get_denoiser(dit), workers=2)


def content(path):
    """Everything that a file says; safetensors writes its metadata in any order."""
    if path.suffix == ".json":
        return path.read_text()
    tensors, metadata = load_tensors(path)
    return {name: (t.dtype, t.tolist()) for name, t in tensors.items()}, metadata


def contents(folder):
    return {path.name: content(path) for path in Path(folder).iterdir()}


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in Path(folder).glob("*.safetensors")}


@pytest.mark.parametrize("workers", [1, 3])
def test_files_are_the_same_for_any_number_of_workers(dit, layers, built, tmp_path, workers):
    before = torch.get_num_threads()
    WeightBank(tmp_path, layers, OPTIONS).build(get_denoiser(dit), workers=workers)
    assert contents(tmp_path) == contents(built.folder)
    assert torch.get_num_threads() == before


def test_two_cores_share_the_work_in_processes_and_files_are_the_same(dit, layers, built, tmp_path, monkeypatch):
    few, started, launch, asked = layers[:7], [], bank_processes.launch, bank_processes.asked
    monkeypatch.setattr(bank_processes, "SMALL", 0)
    left: list[bool] = []  # files with weights, when they have been read
    monkeypatch.setattr(
        bank_processes, "asked", lambda *a: (asked(*a), left.append(Path(json.loads(a[1])["weight"]).exists()))[0]
    )
    monkeypatch.setattr(bank_processes, "launch", lambda *a, **how: started.append(launch(*a, **how)) or started[-1])
    WeightBank(tmp_path, few, OPTIONS).build(get_denoiser(dit), workers=2)
    assert len(started) == 2
    assert left == [False] * 7  # who reads a weight deletes it: a killed search leaves none
    assert all(process.returncode is not None for process in started)  # none is left
    whole, found = contents(built.folder), contents(tmp_path)
    assert len(stamps(tmp_path)) == 7
    assert all(found[name] == whole[name] for name in stamps(tmp_path))
    WeightBank(tmp_path, few, OPTIONS).build(get_denoiser(dit), workers=2)
    assert len(started) <= 2  # what is there needs none


def test_moments_in_files_reach_the_processes_and_those_in_memory_stay(dit, layers, tmp_path, monkeypatch):
    monkeypatch.setattr(bank_processes, "SMALL", 0)
    calls = calibration_calls(dit, load_protocol("digits-dit"), range(2), steps=2)
    few, options, denoiser = layers[1:4], [Scheme.parse("uniform-channel-3-feedback")], get_denoiser(dit)
    names = [layer.name for layer in few]
    stored = JointMoments({"transformer": gather_moments(denoiser, calls, names, folder=tmp_path / "moments")})
    held = {name: stored[name].held() for name in names}
    for folder, moments in (("processes", stored), ("here", held)):
        WeightBank(tmp_path / folder, few, options).build(denoiser, moments=moments, workers=3)
    assert contents(tmp_path / "processes") == contents(tmp_path / "here")


def test_what_a_process_cannot_quantize_or_one_that_dies_is_one_clear_error(layers, tmp_path, monkeypatch):
    monkeypatch.setattr(bank_processes, "SMALL", 0)
    layer = replace(layers[0], name="a", shape=(2, 2), num_weights=4, split=None)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2, bias=False)})
    torch.nn.init.constant_(model["a"].weight, torch.nan)
    with pytest.raises(QuantDMError, match=r"^a: got 4 NaN or infinite weights"):
        WeightBank(tmp_path, [layer], OPTIONS).build(model, workers=3)
    monkeypatch.setattr(bank_processes, "__name__", "quantdm.no_such_module")
    with pytest.raises(QuantDMError, match=r"^a: the process that quantized it ended with exit code 1"):
        WeightBank(tmp_path, [layer], OPTIONS).build(model, workers=3)
    assert not stamps(tmp_path)


def test_progress_adds_up_to_all_weights(dit, layers, tmp_path):
    seen = []
    WeightBank(tmp_path, layers, OPTIONS).build(get_denoiser(dit), workers=1, progress=seen.append)
    assert sum(seen) == sum(layer.num_weights for layer in layers)
    assert seen == sorted(seen, reverse=True)  # the largest first, so that no thread ends alone with it


def test_the_bank_weighs_what_is_counted(built, layers):
    for layer in layers:
        tensors, _ = load_tensors(built._files[layer.name])
        counted = sum(count_bits(layer.shape, scheme, layer.split) for scheme in OPTIONS) / 8
        assert counted <= sum(t.nbytes for t in tensors.values()) < counted + len(OPTIONS) * layer.quantizers


@pytest.mark.parametrize("shards", [1, 2])
def test_weights_come_from_files_as_from_the_denoiser(dit, layers, built, tmp_path, shards):
    state = get_denoiser(dit).state_dict()
    names = sorted(state)
    for shard in range(shards):
        save_file({name: state[name].clone() for name in names[shard::shards]}, tmp_path / f"{shard}.safetensors")
    source = tmp_path if shards > 1 else tmp_path / "0.safetensors"
    WeightBank(tmp_path / "bank", layers, OPTIONS).build(source)
    assert contents(tmp_path / "bank") == contents(built.folder)


def test_a_weight_in_two_files_or_in_none_is_an_error(dit, layers, tmp_path):
    name = f"{layers[0].name}.weight"
    weight = get_denoiser(dit).get_parameter(name).detach()
    bank = WeightBank(tmp_path / "bank", layers[:1], OPTIONS)
    with pytest.raises(QuantDMError, match="no such file"):
        bank.build(tmp_path / "weights.safetensors")
    with pytest.raises(QuantDMError, match="no safetensors files"):
        bank.build(tmp_path)
    save_file({"other": weight}, tmp_path / "0.safetensors")
    with pytest.raises(QuantDMError, match="no tensor"):
        bank.build(tmp_path)
    for variant in ("1", "2"):
        save_file({name: weight}, tmp_path / f"{variant}.safetensors")
    with pytest.raises(QuantDMError, match="name one of the files"):
        bank.build(tmp_path)
    (tmp_path / "0.safetensors").write_bytes(b"no header")
    with pytest.raises(QuantDMError, match="damaged"):
        bank.build(tmp_path)


def test_building_again_writes_nothing_and_a_changed_weight_its_own_file(dit, layers, built, tmp_path):
    folder = shutil.copytree(built.folder, tmp_path / "bank")
    before = stamps(folder)
    denoiser = get_denoiser(dit)
    WeightBank(folder, layers, OPTIONS).build(denoiser)
    assert stamps(folder) == before
    parameter = denoiser.get_parameter(f"{layers[0].name}.weight")
    original = parameter.data
    try:
        parameter.data = original * 2
        other = WeightBank(folder, layers, OPTIONS).build(denoiser)
    finally:
        parameter.data = original
    assert len(stamps(folder)) == len(before) + 1
    assert other._files[layers[0].name].name != built._files[layers[0].name].name


def test_a_bad_weight_is_named_and_what_is_finished_stays(dit, layers, tmp_path):
    denoiser = get_denoiser(dit)
    smallest = min(layers, key=lambda layer: layer.num_weights)
    parameter = denoiser.get_parameter(f"{smallest.name}.weight")
    original = parameter.data
    try:
        parameter.data = torch.full_like(original, torch.nan)
        with pytest.raises(QuantDMError, match=smallest.name):
            WeightBank(tmp_path, layers, OPTIONS).build(denoiser, workers=1)
    finally:
        parameter.data = original
    assert len(stamps(tmp_path)) == len(layers) - 1
    with pytest.raises(QuantDMError, match="expected"):
        WeightBank(tmp_path, [replace(layers[0], shape=(3, 3))], OPTIONS).build(denoiser)


BUILD = """
import sys, time, torch
from quantdm import get_denoiser, list_layers, load_pipeline
from quantdm.bank import layer_build, weight_bank
from tests.test_bank import OPTIONS
torch.set_num_threads(1)
quantize = layer_build.quantize_options
def slowly(*args, **kwargs):  # it does not finish before it is killed
    time.sleep(0.2)
    return quantize(*args, **kwargs)
layer_build.quantize_options = slowly
denoiser = get_denoiser(load_pipeline("digits-dit"))
weight_bank.WeightBank(sys.argv[1], list_layers(denoiser)[:12], OPTIONS).build(denoiser, workers=1)
"""


def test_a_build_that_was_killed_goes_on(dit, layers, built, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", BUILD, str(tmp_path)], cwd=ROOT, env=environment())
    deadline = time.monotonic() + 120
    while len(stamps(tmp_path)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done, whole = stamps(tmp_path), contents(built.folder)
    assert 3 <= len(done) < len(layers)
    assert all(content(tmp_path / name) == whole[name] for name in done)  # no half file
    assert not (tmp_path / "index.json").exists()
    WeightBank(tmp_path, layers, OPTIONS).build(get_denoiser(dit))
    assert {name: stamp for name, stamp in stamps(tmp_path).items() if name in done} == done


def test_nothing_of_a_written_layer_stays_in_memory(dit, layers, built, monkeypatch, tmp_path):
    """Every layer's packed tensors are gone when the next but one is written: only the last ones are alive."""
    import weakref

    alive: list[weakref.ref] = []
    most = 0
    quantize = layer_build.quantize_options

    def watched(*args, **kwargs):
        nonlocal most
        items = quantize(*args, **kwargs)
        alive.extend(weakref.ref(item) for item in items)
        most = max(most, sum(ref() is not None for ref in alive))
        return items

    monkeypatch.setattr(layer_build, "quantize_options", watched)
    bank = WeightBank(tmp_path, layers, OPTIONS).build(get_denoiser(dit), workers=1)
    assert len(alive) == len(layers) * len(OPTIONS)
    assert most <= 2 * len(OPTIONS)
    assert not bank._loaded
    assert not bank._dense


def test_stored_options_are_memory_mapped(built, layers):
    opened = WeightBank.open(built.folder, layers, OPTIONS)
    codes = opened.get(layers[0].name, OPTIONS[0]).tensors["codes"]
    maps = Path("/proc/self/maps").read_text()
    assert str(built._files[layers[0].name].resolve()) in maps
    start, end = codes.untyped_storage().data_ptr(), codes.untyped_storage().data_ptr() + 1
    ranges = [line.split()[0].split("-") for line in maps.splitlines() if built._files[layers[0].name].name in line]
    assert any(int(a, 16) <= start and end <= int(b, 16) for a, b in ranges)


def test_a_swap_moves_pointers_and_puts_them_back(dit, layers, built):
    denoiser = get_denoiser(dit)
    names = [layer.name for layer in layers]
    weights = [denoiser.get_parameter(f"{name}.weight") for name in names]
    before = [weight.data_ptr() for weight in weights]
    config = dict.fromkeys(names, OPTIONS[1])
    with built.applied(denoiser, config):
        first = [weight.data_ptr() for weight in weights]
        for name, weight in zip(names, weights, strict=True):
            assert torch.equal(weight, built.get(name, OPTIONS[1]).dequantize())
    assert [weight.data_ptr() for weight in weights] == before
    with built.applied(denoiser, config):
        assert [weight.data_ptr() for weight in weights] == first
    with (
        pytest.raises(QuantDMError, match="no option"),
        built.applied(denoiser, {names[0]: Scheme.parse("log2-channel-3")}),
    ):
        pass
    assert [weight.data_ptr() for weight in weights] == before


def test_two_names_of_one_parameter_are_both_put_back(dit, layers, built):
    shape = layers[0].shape
    twin = next(layer for layer in layers[1:] if layer.shape == shape or layer.num_weights)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2, bias=False)})
    model["b"] = model["a"]
    layer_a, layer_b = replace(layers[0], name="a", shape=(2, 2), num_weights=4), replace(twin, name="b", shape=(2, 2))
    bank = WeightBank(built.folder.parent / "twins", [layer_a, layer_b], OPTIONS).build(model)
    pointer = model["a"].weight.data_ptr()
    with bank.applied(model, {"a": OPTIONS[0], "b": OPTIONS[1]}):
        assert model["a"].weight.data_ptr() != pointer
    assert model["a"].weight.data_ptr() == pointer


def test_decoded_weights_are_kept_up_to_a_number_of_bytes(built, layers):
    sizes = {layer.name: 4 * layer.num_weights for layer in layers}
    small = sorted(layers, key=lambda layer: layer.num_weights)[:3]
    limit = sum(sizes.values())
    bank = WeightBank.open(built.folder, layers, OPTIONS, cache_bytes=limit)
    first = {layer.name: bank.dense(layer.name, OPTIONS[0], torch.float32) for layer in [*small, *layers]}
    assert bank._dense_bytes == limit
    assert bank.dense(small[0].name, OPTIONS[0], torch.float32) is first[small[0].name]
    bank.dense(small[0].name, OPTIONS[1], torch.float32)
    assert bank._dense_bytes <= limit
    oldest = next(layer for layer in layers if layer not in small)
    assert bank.dense(oldest.name, OPTIONS[0], torch.float32) is not first[oldest.name]  # it was dropped
    none = WeightBank.open(built.folder, layers, OPTIONS, cache_bytes=limit - 1)
    assert none.dense(small[0].name, OPTIONS[0], torch.float32) is not none.dense(
        small[0].name, OPTIONS[0], torch.float32
    )
    assert not none._dense


def test_a_layer_above_the_limit_goes_alone(monkeypatch, dit, layers, built, tmp_path):
    monkeypatch.setattr(weight_bank, "IN_FLIGHT", 1)
    WeightBank(tmp_path, layers, OPTIONS).build(get_denoiser(dit), workers=3)
    assert contents(tmp_path) == contents(built.folder)


def test_opening_for_another_denoiser_is_an_error(built, layers):
    with pytest.raises(QuantDMError, match="another denoiser"):
        WeightBank.open(built.folder, [replace(layers[0], name="elsewhere")], OPTIONS)
    with pytest.raises(QuantDMError, match="build the bank first"):
        WeightBank(built.folder, layers, OPTIONS).get(layers[0].name, OPTIONS[0])


def test_moments_belong_to_the_address_of_calibrated_options_only(tmp_path):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(8, 4, bias=False)})
    from quantdm.denoisers.inventory import LayerRecord

    layer = LayerRecord("a", "linear", "", "", 32, (4, 8), 1, None, 0, "")  # type: ignore[arg-type]
    one, two = (Moments(torch.eye(8)[None] * torch.arange(1.0, 9) ** power, 10) for power in (0, 2))
    for options, files in (((OPTIONS[0],), 1), ((Scheme.parse("uniform-channel-3-importance"),), 2)):
        folder = tmp_path / options[0].label
        for moments in (one, two):
            WeightBank(folder, [layer], options).build(model, moments={"a": moments})
        assert len(stamps(folder)) == files
    with pytest.raises(QuantDMError, match="moments"):
        WeightBank(folder, [layer], options).build(model)
    with pytest.raises(QuantDMError, match="none for a"):
        WeightBank(folder, [layer], options).build(model, moments={})


def test_what_was_looked_for_is_made_without_a_second_hash(tmp_path, monkeypatch):
    from quantdm.denoisers.inventory import LayerRecord

    layer, weight, before = LayerRecord("a", "linear", "", "", 32, (4, 8), 1, None, 0, ""), torch.randn(4, 8), None  # type: ignore[arg-type]
    for options in (OPTIONS[:1], OPTIONS):  # the second takes over what the first has
        task = layer_build.LayerBuild(tmp_path, layer.name, layer.split, options, 0, before)
        address = task.look(weight, None)
        with monkeypatch.context() as patched:
            patched.delattr(layer_build, "digest")
            before = task.make(weight, None, address)
        assert before == address.path == task.look(weight, None)
