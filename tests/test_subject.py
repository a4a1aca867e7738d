"""The subject: a pipeline is looked at once, and measured as it is."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import EulerDiscreteScheduler, LTXVideoTransformer3DModel

import quantdm
from quantdm import (
    ActivationSpec,
    QuantDMError,
    Recipe,
    apply_recipe,
    capture_inputs,
    list_layers,
    load_pipeline,
    load_protocol,
)
from quantdm.activations import activation_spec, set_activation_bits_
from quantdm.denoisers import analysis
from quantdm.denoisers.given_inputs import describe_inputs, parse_inputs, read_inputs
from quantdm.denoisers.tables import list_tables
from quantdm.metrics.samples import Draw, Samples
from quantdm.modules import packed_layers
from quantdm.pipelines import subject as subjects
from quantdm.pipelines.generate import generate
from quantdm.pipelines.parts import find_denoisers
from quantdm.pipelines.seen import differences
from quantdm.pipelines.subject import look_at
from quantdm.recipe import Rules, joint_config, joint_rules
from quantdm.runs.engines import local
from quantdm.runs.engines.local import Engine
from quantdm.runs.evaluator import Evaluator, Job
from quantdm.runs.run import Run
from quantdm.runs.search import start_run
from quantdm.runs.stages import build_bank, measure_space
from quantdm.schemes import QuantConfig
from tests.programs import environment
from tests.test_layers import Strange
from tests.tiny_search import EFFORT, OPTIONS
from tests.two_denoisers import make_two_experts, make_wan


def other_scheduler(pipe):
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)


def other_setting(pipe):
    pipe.scheduler.register_to_config(timestep_spacing="linspace")


def other_vae(pipe):
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias += 0.05


def other_transformer(pipe):
    with torch.no_grad():
        pipe.transformer.proj_out_2.weight *= 1.01


CHANGES = {
    other_scheduler: "scheduler is DDIMScheduler, now EulerDiscreteScheduler",
    other_setting: "scheduler.timestep_spacing is 'leading', now 'linspace'",
    other_vae: "vae has other weights",
    other_transformer: "transformer has other weights",
}


def start(pipe, folder):
    """Start a run on the processor, where there may be several workers."""
    subject, protocol = look_at(pipe, device="cpu"), load_protocol("digits-dit")
    return start_run(subject, folder, target_bits=3.2, trials=30, options=OPTIONS, effort=EFFORT, protocol=protocol)


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_a_pipeline_that_was_changed_after_loading_is_measured_as_it_is(tmp_path, change):
    pipe = load_pipeline("digits-dit")
    change(pipe)
    run, subject = start(pipe, tmp_path / "run")
    build_bank(run, subject)
    draws = [Draw(5, 6, 3), Draw(6, 6, 3)]
    with Engine(run, subject, workers=2) as engine:
        assert engine.workers == 2
        list(engine.map("prepare", draws))
    for path in (tmp_path / "run" / "reference").glob("*.safetensors"):
        measured = Samples.load(path).images
        live = [generate(pipe, run.settings.protocol, draw.seeds, steps=3) for draw in draws]
        assert any(torch.equal(measured, (images.clamp(0, 1) * 255).round().to(torch.uint8)) for images in live)


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_the_same_run_directory_refuses_another_pipeline_and_names_the_difference(tmp_path, change):
    start(load_pipeline("digits-dit"), tmp_path / "run")
    pipe = load_pipeline("digits-dit")
    change(pipe)
    with pytest.raises(QuantDMError) as caught:
        start(pipe, tmp_path / "run")
    assert CHANGES[change] in str(caught.value)
    assert "Choose another --run-dir" in str(caught.value)


def test_a_pipeline_that_changed_on_disk_since_the_run_started_is_refused(tmp_path):
    pipe = load_pipeline("digits-dit")
    pipe.save_pretrained(tmp_path / "mine")
    run, _ = start(str(tmp_path / "mine"), tmp_path / "run")
    assert run.open_subject().name == str(tmp_path / "mine")
    other_transformer(pipe)
    pipe.save_pretrained(tmp_path / "mine")
    with pytest.raises(QuantDMError, match="is not what it was when the run started: transformer has other weights"):
        run.open_subject()


def test_a_live_pipelines_dtype_and_device_are_used_and_recorded(tmp_path):
    run, subject = start(load_pipeline("digits-dit", torch_dtype=torch.bfloat16), tmp_path / "half")
    assert run.settings.dtype == "bfloat16"
    assert {part.dtype for part in run.settings.seen.parts.values()} == {"bfloat16", None}
    assert run.settings.seen.device == "cpu"
    assert Evaluator(run, subject).pipe is subject.pipe if build_bank(run, subject) else False
    full, _ = start(load_pipeline("digits-dit"), tmp_path / "full")
    assert full.settings.dtype == "float32"


def test_a_copy_in_another_dtype_leaves_the_original_and_shares_nothing():
    subject = look_at("digits-sd")
    other = subject.in_dtype(torch.bfloat16)
    assert {p.dtype for p in subject.pipe.unet.parameters()} == {torch.float32}
    assert {p.dtype for m in (other.unet, other.vae, other.text_encoder) for p in m.parameters()} == {torch.bfloat16}
    assert other.scheduler is not subject.pipe.scheduler
    assert subject.in_dtype(torch.float32) is subject.pipe
    assert not differences(subject.seen, look_at("digits-sd").seen)


def test_a_run_opens_and_traces_its_pipeline_once_per_process(tmp_path, monkeypatch):
    loads, traces = [], []
    load, trace = subjects.load_pipeline, analysis.trace_forward
    monkeypatch.setattr(subjects, "load_pipeline", lambda *a, **k: (loads.append(a), load(*a, **k))[1])
    monkeypatch.setattr(analysis, "trace_forward", lambda *a, **k: (traces.append(a), trace(*a, **k))[1])
    monkeypatch.setattr(analysis, "_CACHE", {})
    run, subject = start("digits-dit", tmp_path / "run")
    bank = build_bank(run, subject)
    with Engine(run, subject, workers=1) as engine:
        measure_space(run, engine, subject, bank)
        engine.local.measure(Job(Draw(1, 4, 2), dict.fromkeys((la.name for la in subject.layers), "kmeans-channel-3")))
    assert (len(loads), len(traces)) == (1, 1)
    loads.clear(), traces.clear()
    monkeypatch.setattr(analysis, "_CACHE", {})
    again = Run.open(tmp_path / "run")
    Evaluator(again, again.open_subject()).measure(Job(Draw(1, 4, 2)))  # what a worker does
    assert (len(loads), len(traces)) == (1, 1)


PLAIN = """
from quantdm import load_pipeline, search
from quantdm.runs.settings import Effort
from quantdm import Scheme

print("started")
options = [Scheme(method="uniform", bits=b) for b in (2, 4)]
run_dir, target = {run!r}, {target}
search(load_pipeline("digits-dit"), target_bits=target, trials=30, run_dir=run_dir, options=options, workers=2,
       effort=Effort(label_images=8, label_steps=2, verify_images=8, noise_images=1))
"""


def test_a_plain_script_without_a_guard_can_search(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(PLAIN.format(run=str(tmp_path / "run"), target=3.2))
    done = subprocess.run(
        [sys.executable, str(script)], env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("started") == 1  # no worker ran the script
    assert (tmp_path / "run" / "recipe.yaml").is_file()


def test_what_a_worker_raises_is_one_clear_error(tmp_path):
    run, subject = start("digits-dit", tmp_path / "run")
    with Engine(run, subject, workers=2) as engine, pytest.raises(QuantDMError, match="no such file"):
        list(engine.map("prepare", [Draw(1, 2, 2), Draw(2, 2, 2)]))  # there is no bank yet


def test_the_job_of_a_worker_that_dies_goes_to_a_new_one_and_one_that_always_hangs_is_an_error(tmp_path, monkeypatch):
    run, subject = start("digits-dit", tmp_path / "run")
    build_bank(run, subject)
    with Engine(run, subject, workers=2) as engine:
        jobs = engine.map("prepare", [Draw(base, 8, 2) for base in range(6)])
        next(jobs)
        assert len(engine._processes) == 2
        for process in engine._processes:
            process.kill()
        assert len(list(jobs)) == 5
        assert len(list(run.path("reference").glob("*.safetensors"))) == 6  # a killed worker may leave a .tmp
        engine._slowest = {"images": 1e-9}
        monkeypatch.setattr(local, "LEAST_PATIENCE", 0.2)
        monkeypatch.setattr(local, "TRIES", 1)
        with pytest.raises(QuantDMError, match=r"ended 1 worker processes \(the last with exit code -9\)"):
            list(engine.map("prepare", [Draw(base, 300, 20) for base in (50, 51)]))


# ------------------------------------------------------------------------------------------------ example inputs


def make_ltx():
    torch.manual_seed(0)
    return LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, caption_channels=12,
    )  # fmt: skip


INPUTS = {
    "hidden_states": torch.zeros(2, 24, 8),
    "encoder_hidden_states": torch.zeros(2, 5, 12),
    "timestep": torch.zeros(2, dtype=torch.long),
    "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool),
    "num_frames": 2,
    "height": 3,
    "width": 4,
    "return_dict": False,
}
STRANGE = {"hidden_states": torch.ones(1, 2, 4), "aura": torch.zeros(3), "mood": torch.zeros(1)}  # no rule knows them


@pytest.fixture
def forgetful(monkeypatch):
    """Without what other tests gave."""
    monkeypatch.setattr(analysis, "_CACHE", {})
    monkeypatch.setattr(analysis, "_GIVEN", {})


def test_an_untraceable_denoiser_names_doors_that_take_example_inputs(forgetful, tmp_path):
    with pytest.raises(QuantDMError, match=r"apply_recipe, search and QuantDMConfig, --example-inputs FILE"):
        list_layers(Strange())
    names = [layer.name for layer in list_layers(Strange(), example_inputs=STRANGE)]
    assert names == ["proj"]
    # given once, they serve: another model of the same architecture is seen without them
    assert [layer.name for layer in list_layers(Strange())] == names


def test_apply_takes_example_inputs_and_activations_use_them(forgetful):
    model = make_ltx()
    recipe = Recipe(model="ltx", default="uniform-channel-4", activations=ActivationSpec(bits=8))
    apply_recipe(model, recipe, example_inputs=INPUTS, insist=True)
    assert len(packed_layers(model)) == len(list_layers(model))
    assert activation_spec(model) == ActivationSpec(bits=8)
    set_activation_bits_(model, None)


def test_a_saved_model_carries_its_example_inputs(forgetful, tmp_path, monkeypatch):
    model = Strange()
    recipe = Recipe(model="strange", default="uniform-channel-4", activations=ActivationSpec(bits=8))
    apply_recipe(model, recipe, example_inputs=STRANGE, insist=True)
    expected = model(**STRANGE)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(analysis, "_CACHE", {})
    monkeypatch.setattr(analysis, "_GIVEN", {})  # a new process
    again = Strange.from_pretrained(tmp_path)
    assert torch.equal(again(**STRANGE), expected)


def test_example_inputs_survive_as_text(tmp_path):
    record = describe_inputs(INPUTS)
    assert record["hidden_states"] == "float32[2, 24, 8]"
    path = tmp_path / "inputs.yaml"
    path.write_text(json.dumps(record))
    again = read_inputs(path)
    assert describe_inputs(again) == record == describe_inputs(parse_inputs(record))
    assert again["timestep"].is_meta
    for text, expected in (
        ("[1, 2]", "expected the keyword arguments"),
        ("a: {", "not YAML"),
        ("x: float9[1]", "dtype"),
    ):
        path.write_text(text)
        with pytest.raises(QuantDMError, match=expected):
            read_inputs(path)
    with pytest.raises(QuantDMError, match="cannot be read"):
        read_inputs(tmp_path / "none.yaml")


def test_inputs_are_captured_from_one_call(forgetful, sd):
    found = capture_inputs(sd, lambda: sd("a seven", num_inference_steps=2, output_type="latent"))
    assert set(found) == {"unet"}
    assert found["unet"]["sample"].shape == (2, 4, 8, 8)
    plain, given = list_layers(sd.unet), list_layers(sd.unet, example_inputs=found["unet"])
    assert [layer.name for layer in plain] == [layer.name for layer in given]
    with pytest.raises(QuantDMError, match="did not run unet"):
        capture_inputs(sd, lambda: None)


# ------------------------------------------------------------------------------------------------- two denoisers


def test_both_denoisers_of_wan_are_found_and_named():
    pipe = make_wan()
    assert tuple(find_denoisers(pipe)) == ("transformer", "transformer_2")
    subject = look_at(pipe)
    names = [layer.name for layer in subject.layers]
    own = [layer.name for layer in list_layers(pipe.transformer)]
    assert names[: len(own)] == own
    assert set(names[len(own) :]) == {f"transformer_2:{layer.name}" for layer in list_layers(pipe.transformer_2)}
    assert {node.layer for node in subject.graph.nodes if node.layer} == set(names)
    assert all(a < b for a, b in subject.graph.edges)
    for name in names:
        assert subject.weights.get_parameter(f"{name}.weight").shape  # every weight, under its joint name


def test_a_joint_config_and_its_recipe_mean_the_same():
    subject = look_at(make_wan())
    labels = {layer.name: f"uniform-channel-{2 + index % 7}" for index, layer in enumerate(subject.layers)}
    recipe = Recipe(model="wan", **joint_rules(labels, subject.part_names))
    assert joint_config(recipe, subject.layers, subject.part_names).to_labels() == labels
    some = Recipe(model="wan", default="uniform-channel-4")
    found = joint_config(some, subject.layers, subject.part_names)
    assert {scheme is None for name, scheme in found.items() if name.startswith("transformer_2:")} == {True}


def test_nothing_of_a_second_denoiser_stays_dense_silently(tmp_path):
    pipe = make_wan()
    with pytest.raises(QuantDMError, match=r"says nothing of transformer_2.*default: original"):
        apply_recipe(pipe, Recipe(model="wan", default="uniform-channel-4"), insist=True)
    assert not packed_layers(pipe.transformer)
    rules = {"transformer_2": Rules(default="kmeans-channel-3")}
    apply_recipe(pipe, Recipe(model="wan", default="uniform-channel-4", components=rules), insist=True)
    assert len(packed_layers(pipe.transformer_2)) == len(list_layers(pipe.transformer_2))
    pipe.transformer_2.save_pretrained(tmp_path / "second")
    left = make_wan()
    apply_recipe(
        left,
        Recipe(model="wan", default="uniform-channel-4", components={"transformer_2": Rules(default="original")}),
        insist=True,
    )
    assert packed_layers(left.transformer)
    assert not packed_layers(left.transformer_2)
    joint = make_wan()
    names = [layer.name for layer in look_at(joint).layers]
    apply_recipe(joint, QuantConfig.from_labels(dict.fromkeys(names, "uniform-channel-4")), insist=True)
    assert len(packed_layers(joint.transformer)) + len(packed_layers(joint.transformer_2)) == len(names)


def test_two_experts_are_searched_and_quantized_together(tmp_path):
    pipe = make_two_experts()
    recipe = quantdm.search(
        pipe, target_bits=3.2, trials=30, run_dir=tmp_path / "run", options=OPTIONS, effort=EFFORT, workers=1,
        protocol=load_protocol("digits-dit"),
    )  # fmt: skip
    assert set(recipe.components) == {"transformer_2"}
    assert recipe.components["transformer_2"].layers.keys() == recipe.layers.keys()
    apply_recipe(pipe, recipe, insist=True)
    layers, tables = list_layers(pipe.transformer), list_tables(pipe.transformer)
    packed = [packed_layers(part).keys() for part in (pipe.transformer, pipe.transformer_2)]
    assert packed[0] == packed[1]
    assert len(packed[0]) == len(layers) + len(tables)
