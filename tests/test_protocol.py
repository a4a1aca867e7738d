"""A protocol says what it means: files, rows and constants are read once, and what cannot be made is refused before."""

import json
import os
import re
from pathlib import Path

import diffusers
import pytest
import torch
import yaml
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from safetensors.torch import save_file
from typer.testing import CliRunner

from quantdm import Protocol, QuantDMError, evaluate, generate, load_pipeline, load_protocol, search
from quantdm.cli.main import app
from quantdm.metrics.door import check_measures
from quantdm.pipelines.checks import check_generates
from quantdm.pipelines.exported import exported
from quantdm.pipelines.inputs import Drawn, Picture
from quantdm.pipelines.protocol import default_protocol, known_protocols, protocol_schema
from quantdm.pipelines.sizes import MOST_IMAGES, auto_batch, budget, bytes_per_image, image_size
from quantdm.runs.run import Run, RunSettings
from tests.pipeline_kinds import PROMPTS, make, picture, sd_parts
from tests.report_run import SEEN

BASE = {"version": 2, **PROMPTS, "steps": 2, "features": "pyramid"}


def written(folder, **said):
    """Write a protocol file and return its path."""
    path = folder / "protocol.yaml"
    path.write_text(yaml.safe_dump({**BASE, **said}))
    return path


def refused(pattern, action):
    """Expect one clear error, in one line, that says what was wrong."""
    with pytest.raises(QuantDMError, match=pattern) as caught:
        action()
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 600


# ---------------------------------------------------------------------------------------------------- what a file says


def test_paths_are_relative_to_the_protocol_file_and_text_travels_with_it(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    (folder / "in").mkdir(parents=True)
    (folder / "in/p.txt").write_text("\ufeffone cat\n\n  two cats  \n", encoding="utf-8")
    (folder / "in/n.jsonl").write_text('{"caption": "x", "n": 1}\n{"caption": "y", "n": 2}\n')
    names = [picture(folder / f"in/{i}.png", shade=i) for i in (7, 3)]
    save_file({"e": torch.ones(2)}, folder / "in/t.safetensors")
    path = written(
        folder,
        values={"lines": "in/p.txt"},
        call={
            "negative_prompt": {"jsonl": "in/n.jsonl", "key": "caption"},
            "image": {"images": "in"},
            "mask_image": {"image": f"in/{names[0]}"},
            "prompt_embeds": {"tensor": "in/t.safetensors", "name": "e"},
            "video": {"frames": "in"},
        },
    )
    monkeypatch.chdir(folder)
    first = load_protocol("protocol.yaml")
    monkeypatch.chdir(tmp_path)
    found = load_protocol(path)
    assert found == first
    assert found.values == ("one cat", "two cats")
    assert found.call["negative_prompt"] == ("x", "y")
    assert [os.path.basename(p.image) for p in found.call["image"]] == ["3.png", "7.png"]
    os.remove(folder / "in/p.txt")
    again = Protocol.model_validate_json(found.model_dump_json())  # as a run keeps it
    assert again == found
    assert again.call["mask_image"].open((1, 1), fit=False).size == (32, 32)
    assert again.call["mask_image"].open((16, 8), fit=True).size == (16, 8)
    assert len(again.call["video"].open((1, 1), fit=False)) == 2
    assert torch.equal(again.call["prompt_embeds"].open((1, 1), fit=False), torch.ones(2))


def test_rows_come_from_a_list_or_from_a_file_with_paths_beside_it(tmp_path):
    picture(tmp_path / "a.png")
    rows = [{"prompt": "a", "image": {"image": "a.png"}}, {"prompt": "b", "image": {"drawn": "scene", "number": 2}}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    listed = load_protocol(written(tmp_path, argument="none", values=None, rows=rows))
    filed = load_protocol(written(tmp_path, argument="none", values=None, rows={"jsonl": "rows.jsonl"}))
    assert listed == filed
    assert isinstance(filed.of_image(2)["image"], Picture)
    assert filed.of_image(5) == {"prompt": "b", "image": Drawn(drawn="scene", number=2)}
    assert filed.conditions == ("a", "b")


def test_lists_turn_and_constants_stay():
    protocol = Protocol(**BASE, call={"strength": [0.5, 0.75], "height": 32, "sizes": {"value": [1, 2]}})
    seen = [protocol.of_image(i) for i in range(6)]
    assert [row["prompt"] for row in seen] == list(PROMPTS["values"]) * 2
    assert [row["strength"] for row in seen] == [0.5, 0.75] * 3
    assert {row["height"] for row in seen} == {32}
    assert seen[0]["sizes"].value == [1, 2]


WRONG = {
    "no steps": ({"steps": 0}, "steps: .*greater than or equal to 1"),
    "steps of text": ({"steps": "many"}, "steps: .*integer"),
    "no values": ({"values": []}, r"values: got \[\], expected a list of one or more"),
    "text for values": ({"values": "a cat"}, "values: got 'a cat', expected a list"),
    "lists for values": ({"values": [[1]]}, r"values: got \[\[1\]\], expected a list"),
    "no argument": ({"argument": "none"}, "argument: missing; argument and values go together"),
    "values of nothing": ({"values": None}, "values: missing"),
    "unknown key": ({"vlues": 1}, "vlues: unknown; nearest: values"),
    "unknown source": (
        {"call": {"image": {"imge": "x"}}},
        r"call.image: got \{'imge': 'x'\}, expected .*\{image: FILE\}",
    ),
    "empty list": ({"call": {"strength": []}}, r"call.strength: got \[\]"),
    "call of text": ({"call": "x"}, "call: got 'x', expected a mapping"),
    "no rows": ({"rows": []}, r"rows: got \[\]"),
    "uneven rows": ({"rows": [{"a": 1}, {"b": 1}]}, "rows.1: has other arguments than rows.0"),
    "twice": ({"call": {"prompt": "x"}}, "prompt: given twice"),
    "version": ({"version": 3}, "version: .*1 or 2"),
    "version 1 with call": ({"version": 1, "guidance_scale": 1.0, "call": {"x": 1}}, "call: .*write `version: 2`"),
    "version 1 with image": ({"version": 1, "argument": "image"}, "argument: got 'image'.*`version: 2`"),
    "infinite guidance": ({"guidance_scale": float("inf")}, "guidance_scale: .*finite"),
    "missing picture": ({"call": {"image": {"image": "no.png"}}}, r"no.png: cannot be read \(No such file"),
    "missing lines": ({"values": {"lines": "no.txt"}}, r"no.txt: cannot be read \(No such file"),
    "missing folder": ({"call": {"image": {"images": "no"}}}, r"no: cannot be read \(No such file"),
    "empty folder": ({"call": {"image": {"images": "."}}}, "holds no picture"),
    "features of a number": ({"features": 3}, "features: .*string"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_protocol_that_says_nothing_sensible_is_one_clear_error(kind, tmp_path):
    said, pattern = WRONG[kind]
    refused(rf"protocol\.yaml: {pattern}|protocol\.yaml: .*{pattern}", lambda: load_protocol(written(tmp_path, **said)))
    if not re.search(r"folder|missing (picture|lines)", kind):
        refused(pattern, lambda: Protocol(**{**BASE, **said}))


@pytest.mark.parametrize(
    ("text", "pattern"),
    [("", "empty, expected"), ('{"b": 1}\n', "line 1: .*with 'a'"), ("{", "line 1: not JSON"),
     ("[1]", "expected a JSON record")],
)  # fmt: skip
def test_a_file_of_records_that_lacks_them_is_one_clear_error(text, pattern, tmp_path):
    (tmp_path / "f.jsonl").write_text(text)
    refused(pattern, lambda: load_protocol(written(tmp_path, values={"jsonl": "f.jsonl", "key": "a"})))


@pytest.mark.parametrize("text", ["- 1\n", "3\n", "", "{1: 2}\n", "a: [\n"])
def test_what_is_no_mapping_is_one_clear_error(text, tmp_path):
    (tmp_path / "p.yaml").write_text(text)
    refused("p.yaml(, line 2)?: (not YAML|got)", lambda: load_protocol(tmp_path / "p.yaml"))


def test_a_file_that_is_not_yaml_is_told_with_its_line(tmp_path):
    (tmp_path / "p.yaml").write_text("version: 2\n  argument: x\nsteps: 1\n")
    refused(r"p\.yaml, line 2: not YAML \(mapping values", lambda: load_protocol(tmp_path / "p.yaml"))


# ------------------------------------------------------------------------------------------------------------ version 1


@pytest.mark.parametrize("name", ["digits-dit", "digits-sd"])
def test_protocol_1_means_the_same_to_the_last_bit(name):
    pipe, protocol = load_pipeline(name), load_protocol(name)
    seeds = list(range(7, 12))
    images = generate(pipe, protocol, seeds, steps=3)
    asked = [protocol.values[i % 10] for i in range(5)]
    out = pipe(
        **{protocol.argument: asked},
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        num_inference_steps=3, guidance_scale=protocol.guidance_scale, output_type="np",
    ).images  # fmt: skip
    assert torch.equal(images, torch.from_numpy(out).permute(0, 3, 1, 2))
    assert auto_batch(pipe, protocol) == MOST_IMAGES


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    settings = RunSettings(
        model="m", location="m", seen=SEEN, options=("kmeans-channel-4",), target_bits=4.0, trials=30, seed=0,
        protocol=load_protocol("digits-dit"), label_images=2, label_steps=1, verify_images=2, noise_images=1,
        dtype="float32",
    )  # fmt: skip
    run = Run.create(tmp_path, settings)
    record = json.loads((tmp_path / "run.json").read_text())
    first = ("version", "argument", "values", "steps", "guidance_scale", "resolution", "features", "real")
    record["protocol"] = {key: record["protocol"][key] for key in first}  # all that protocol 1 wrote
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert Run.open(tmp_path).settings == run.settings
    assert Run.create(tmp_path, run.settings).settings.protocol == load_protocol("digits-dit")


# ------------------------------------------------------------------------------------------------------------- the door

SD = lambda: load_pipeline("digits-sd")  # noqa: E731
REFUSED = {
    "unknown features": (SD, {"features": "inception"}, "got 'inception', expected one of digits, pyramid, "),
    "no CLIP model": (SD, {"features": "clip:nowhere/at all"}, "no weights for 'clip:nowhere/at all'"),
    "numbers for prompts": (SD, {"values": [1, 2]}, "prompt.0: got 1, StableDiffusionPipeline expects text"),
    "one number": (SD, {"values": ["a", 2]}, "prompt.1: got 2"),
    "unknown argument": (SD, {"call": {"negativ_promt": "x"}}, "takes no 'negativ_promt'; nearest: negative_prompt"),
    "text for a size": (SD, {"call": {"height": "tall"}}, "height: got 'tall', .* expects int"),
    "a picture for a size": (SD, {"call": {"height": {"drawn": "scene"}}}, "height: got a picture"),
    "two sizes": (SD, {"call": {"height": [32, 64]}}, "height: got 32, 64, expected one"),
    "a size it refuses": (SD, {"call": {"height": 33}}, "refuses the protocol: .*divisible by 8"),
    "a list of numbers": (SD, {"call": {"sigmas": [1.0, 0.5]}}, r"sigmas.0: got 1.0, .*as it is: \{value: \[...\]\}"),
    "steps as argument": (SD, {"call": {"num_inference_steps": 3}}, "write `steps:`"),
    "generator": (SD, {"call": {"generator": 1}}, "generator cannot be given"),
    "guidance in call": (SD, {"call": {"guidance_scale": 1.0}}, "write `guidance_scale:`"),
    "steps by another name": (SD, {"steps_argument": "num_step"}, "takes no 'num_step'; nearest: num_inference_steps"),
    "a prompt is missing": (SD, {"argument": "none", "values": None}, "needs prompt"),
    "videos": (SD, {"output": "video"}, "makes images; leave it out"),
    "classes for prompts": (SD, {"argument": "class_labels", "values": [1]}, "a protocol whose argument is prompt"),
    "latents for digits": (SD, {"output": "latent", "features": "digits"}, "'digits' of latents, expected 'pyramid'"),
    "classes it has not": (
        lambda: load_pipeline("digits-dit"), {"argument": "class_labels", "values": [3, 1207]},
        "class_labels: got 1207, expected 0 to 999",
    ),
    "text for classes": (
        lambda: load_pipeline("digits-dit"), {"argument": "class_labels", "values": ["three"]},
        "class_labels: got 'three', DiTPipeline expects",
    ),
    "a resolution": (
        lambda: load_pipeline("digits-dit"),
        {"argument": "class_labels", "values": [1], "resolution": 64}, "takes no height and width",
    ),
    "a condition": (lambda: make("ddpm")[0], {}, "takes no condition at all: write `argument: none`"),
    "guidance": (
        lambda: make("ddpm")[0], {"argument": "none", "values": None, "guidance_scale": 2.0}, "no guidance_scale",
    ),
    "latents of pixels": (
        lambda: make("ddpm")[0], {"argument": "none", "values": None, "output": "latent"}, "no latents",
    ),
    "no number of steps": (lambda: make("bare")[0], {"argument": "none", "values": None}, "write `steps: 1`"),
    "no picture": (lambda: make("image-to-image")[0], {}, r"needs a picture \(image\) beside the prompt"),
    "no mask": (
        lambda: make("inpainting")[0], {"call": {"image": {"drawn": "scene"}}}, r"needs a picture \(mask_image\)",
    ),
    "text for a picture": (lambda: make("image-to-image")[0], {"call": {"image": "a.png"}}, "image: got 'a.png'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_made_is_refused_before_anything_runs(kind, tmp_path):
    build, said, pattern = REFUSED[kind]
    pipe, protocol = build(), Protocol(**{**BASE, **said})
    called = []
    module = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    module.register_forward_pre_hook(lambda *_: called.append(1))
    refused(pattern, lambda: evaluate(pipe, protocol=protocol, num_images=2, seeds=[1]))
    if kind in ("unknown features", "numbers for prompts", "classes it has not"):
        called.clear()
        refused(pattern, lambda: search(pipe, target_bits=3.0, run_dir=tmp_path / "run", protocol=protocol))
        assert not list(tmp_path.iterdir())
    assert not called


def test_the_door_looks_at_copies_too(sd):
    for update, pattern in (({"values": ()}, "values"), ({"steps": 0}, "steps"), ({"features": "x"}, "features")):
        protocol = load_protocol("digits-sd").model_copy(update=update)
        refused(pattern, lambda p=protocol: check_measures(sd, p))


def test_the_command_line_refuses_a_protocol_in_one_line(tmp_path):
    path = written(tmp_path, features="inception")
    arguments = [
        "search",
        "digits-sd",
        "--target-bits",
        "3.0",
        "--run-dir",
        str(tmp_path / "r"),
        "--protocol",
        str(path),
    ]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, QuantDMError)
    assert "inception" in str(result.exception)
    assert not (tmp_path / "r").exists()


def test_files_that_are_gone_or_changed_or_of_several_sizes_are_refused_by_name(tmp_path):
    pipe, _ = make("image-to-image")
    for index, size in enumerate([(32, 32), (40, 32)]):
        picture(tmp_path / f"{index}.png", size, shade=index)
    protocol = load_protocol(written(tmp_path, call={"image": {"images": "."}}))
    refused("image: pictures of different sizes .*resolution", lambda: check_generates(pipe, protocol))
    check_generates(pipe, protocol.model_copy(update={"resolution": 32}))
    one = load_protocol(written(tmp_path, call={"image": {"image": "0.png"}}))
    check_generates(pipe, one)
    picture(tmp_path / "0.png", shade=99)
    refused("image: .*0.png: was changed", lambda: check_generates(pipe, one))
    os.remove(tmp_path / "0.png")
    refused("image: .*0.png: cannot be read", lambda: check_generates(pipe, one))
    (tmp_path / "0.png").write_text("no picture")
    text = load_protocol(written(tmp_path, call={"image": {"image": "0.png"}}))
    refused("0.png: cannot be read as a picture", lambda: check_generates(pipe, text))


def test_what_a_pipeline_refuses_only_when_it_is_called_is_one_clear_error(sd):
    protocol = Protocol(**BASE, call={"timesteps": {"value": [900, 500]}})
    refused("StableDiffusionPipeline: refused its call with .*timesteps", lambda: generate(sd, protocol, [1]))


def test_no_pipeline_of_diffusers_brings_the_door_down():
    """Whatever a call looks like, it is taken or refused by name."""
    taken, kinds = 0, 0
    for name in dir(diffusers):
        kind = exported(name)
        if not (isinstance(kind, type) and issubclass(kind, DiffusionPipeline)) or kind is DiffusionPipeline:
            continue
        pipe = object.__new__(kind)
        kinds += 1
        for said in ({}, {"argument": "none", "values": None}, {"argument": "class_labels", "values": [1]}):
            try:
                check_generates(pipe, Protocol(**{**BASE, **said}))
                taken += 1
            except QuantDMError as error:
                assert name in str(error)  # noqa: PT017 - most are refused, each for its own reason
    assert kinds > 200
    assert taken > 100


# -------------------------------------------------------------------------------------------------- memory and schema


@pytest.mark.parametrize("side", [64, 256, 1024])
def test_a_batch_fits_the_memory(side):
    with torch.device("meta"):
        unet = UNet2DModel(sample_size=side, block_out_channels=(128, 128), down_block_types=("DownBlock2D",) * 2,
                           up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    pipe, protocol = DDPMPipeline(unet, DDPMScheduler()), load_protocol("unconditional")
    assert image_size(pipe, protocol) == (side, side)
    batch, available = auto_batch(pipe, protocol), budget(torch.device("cpu"))
    assert batch == 1 or batch * bytes_per_image(pipe, protocol) <= 1.1 * available  # free memory moves meanwhile
    assert batch < MOST_IMAGES


def test_a_large_picture_counts_more_than_a_small_one(sd):
    sizes = [None, 64, 128]
    needs = [bytes_per_image(sd, Protocol(**BASE, resolution=side)) for side in sizes]
    assert needs[0] * 16 == needs[1] * 4 == needs[2]


def test_the_schema_names_every_key_and_every_form_of_a_file():
    schema = protocol_schema()
    assert set(schema["properties"]) == set(Protocol.model_fields)
    assert {"Lines", "JsonLines", "Folder", "DrawnMany", "Picture", "Clip", "TensorFile"} <= set(schema["$defs"])
    printed = CliRunner().invoke(app, ["schema", "--protocol"]).output
    assert json.loads(printed) == schema


@pytest.mark.parametrize("name", known_protocols())
def test_shipped_protocols_are_read_by_name_and_say_what_they_promise(name):
    protocol = load_protocol(name)
    assert Protocol.model_validate_json(protocol.model_dump_json()) == protocol
    if name.startswith("text-to-image"):
        assert len(set(protocol.values)) == len(protocol.values) == int(name.rpartition("-")[2])


def test_a_pipeline_that_is_called_like_a_protocol_needs_its_own(tmp_path):
    assert default_protocol("digits-sd") == load_protocol("digits-sd")
    for model in ("video", "inpainting", "", str(tmp_path)):
        refused("no protocol for model", lambda m=model: default_protocol(m))


SERVES = {
    "text-to-image-64": lambda: load_pipeline("digits-sd"),
    "text-to-image-512": lambda: load_pipeline("digits-sd"),
    "unconditional": lambda: DDIMPipeline(make("ddpm")[0].unet, DDIMScheduler()),
    "image-to-image": lambda: make("image-to-image")[0],
    "inpainting": lambda: make("inpainting")[0],
    "video": lambda: make("video")[0],
}


@pytest.mark.parametrize("name", SERVES)
def test_shipped_protocols_serve_their_kind_of_pipeline(name):
    pipe, protocol = SERVES[name](), load_protocol(name)
    check_measures(pipe, protocol)
    if name != "video":  # sixteen frames of the usual size: as long as all the others
        assert generate(pipe, protocol, [1, 2], steps=2).isfinite().all()


def test_the_classes_of_imagenet_are_served():
    from diffusers import DiTPipeline, DiTTransformer2DModel

    with torch.device("meta"):
        transformer = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1)
    pipe = DiTPipeline(transformer, sd_parts()["vae"], DDIMScheduler())
    check_measures(pipe, load_protocol("class-conditional"))
    assert len(set(load_protocol("class-conditional").values)) == 100


PAGE = (Path(__file__).resolve().parents[1] / "docs" / "protocol.md").read_text()


@pytest.mark.parametrize(("index", "kind"), list(enumerate(["text-to-image", "inpainting", "ddpm"])))
def test_the_examples_of_the_page_are_right(index, kind, tmp_path):
    examples = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert len(examples) == 3
    (tmp_path / "pictures").mkdir()
    for name in ("room", "hall", "hole"):
        picture(tmp_path / f"pictures/{name}.png", (40, 36))
    (tmp_path / "p.yaml").write_text(examples[index].replace("  max_sequence_length: 128\n", ""))  # of larger encoders
    pipe, protocol = make(kind)[0], load_protocol(tmp_path / "p.yaml")
    check_measures(pipe, protocol)
    if kind != "text-to-image":
        assert generate(pipe, protocol, [1, 2], steps=2).isfinite().all()


def test_the_page_names_every_key_and_every_shipped_protocol():
    for name in (*Protocol.model_fields, *known_protocols()):
        assert f"`{name}`" in PAGE, name
