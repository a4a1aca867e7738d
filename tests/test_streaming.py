"""An export made layer by layer from the files: what `apply_recipe` and `save_pretrained` give, and it goes on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import quantdm.hub.streaming as streaming
from quantdm import QuantDMError, Recipe, export_pipeline, load_pipeline
from quantdm.hub import side_by_side
from quantdm.hub.apply import apply_recipe
from quantdm.hub.inspection import inspect_target
from quantdm.hub.journal import FILE, SUFFIX
from quantdm.hub.shards import lay_out
from quantdm.pipelines import tensor_files
from quantdm.pipelines.loading import open_files
from tests.architectures import PUBLIC
from tests.family_models import make
from tests.hub_models import WEIGHTS, equal_files, make_unet
from tests.two_denoisers import make_wan


def make_sd(text_encoder):
    """A tiny Stable Diffusion pipeline, random."""
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4),
        text_encoder=text_encoder,
        tokenizer=None,  # type: ignore[arg-type]
        unet=make_unet(),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )


def make_llama():
    """A text encoder whose head is tied to its embedding."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=True, **sizes))


PIPELINES = {
    "clip": lambda: make_sd(make("clip")),
    "tied head": lambda: make_sd(make_llama()),
    "two denoisers": make_wan,
}
LABELS = {"default": "kmeans-channel-3", "patterns": {"*to_q": "uniform-group16-4", "*to_k": "original"}}


def recipe_for(pipe):
    """Different schemes for the denoisers and the text encoder."""
    others = {"transformer_2": {"default": "log2-channel-4"}} if "transformer_2" in pipe.components else {}
    return Recipe(model="tiny", components={"text_encoder": {"default": "uniform-channel-5"}, **others}, **LABELS)


def stored(pipe, folder, dtype):
    """Save a pipeline in a dtype and return what opens it again, with the weights as they are stored."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(dtype)
    pipe.save_pretrained(folder)
    return open_files(folder, None, dtype)


def check_equal(made, live):
    """Check that two exported pipelines hold the same, but for what each says of where it was."""
    for path in sorted(live.rglob("*")):
        other = made / path.relative_to(live)
        assert other.is_dir() == path.is_dir(), other
        if path.suffix == ".safetensors":
            assert equal_files(path, other), path
            assert path.stat().st_size == other.stat().st_size
        elif path.is_file():
            mine, theirs = json.loads(other.read_text()), json.loads(path.read_text())
            for record in (mine, theirs):
                record.pop("_name_or_path", None)
                record.pop("dtype", None)  # plain from_pretrained opens the export in float32
            assert mine == theirs, path
    assert {p.relative_to(made) for p in made.rglob("*")} - {p.relative_to(live) for p in live.rglob("*")} == {
        Path("recipe.yaml")
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", PIPELINES)
def test_it_is_what_apply_and_save_give(kind, dtype, tmp_path):
    live = stored(PIPELINES[kind](), tmp_path / "source", dtype)
    recipe = recipe_for(live)
    made = export_pipeline(tmp_path / "source", recipe, tmp_path / "made")
    apply_recipe(live, recipe, insist=True).save_pretrained(tmp_path / "live")
    check_equal(made, tmp_path / "live")
    opened = load_pipeline(made)
    assert "Quant" in repr(opened.text_encoder)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(SUFFIX)]


def test_shards_are_those_of_save_pretrained(tmp_path, monkeypatch):
    live = stored(make_wan(), tmp_path / "source", torch.bfloat16)
    recipe = recipe_for(live)
    monkeypatch.setattr(streaming, "DIFFUSERS", (streaming.DIFFUSERS[0], "10KB"))
    monkeypatch.setattr(streaming, "TRANSFORMERS", (streaming.TRANSFORMERS[0], "1KB"))
    made = export_pipeline(tmp_path / "source", recipe, tmp_path / "made")
    apply_recipe(live, recipe, insist=True)
    for name, size in (("transformer", "10KB"), ("transformer_2", "10KB"), ("text_encoder", "1KB")):
        live.components[name].save_pretrained(tmp_path / "live" / name, max_shard_size=size)
        assert len(list((made / name).glob("*.safetensors"))) > 1
        for path in (tmp_path / "live" / name).glob("*.safetensors"):
            assert equal_files(path, made / name / path.name)
        index = next((tmp_path / "live" / name).glob("*.index.json")).name
        assert json.loads((made / name / index).read_text()) == json.loads(
            (tmp_path / "live" / name / index).read_text()
        )
    load_pipeline(made)


def test_a_network_that_stays_as_it_is_is_copied_bit_by_bit(tmp_path):
    pipe = make_sd(make("clip"))
    pipe.vae.to(torch.bfloat16)
    pipe.unet.to(torch.float16)
    pipe.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    made = export_pipeline(tmp_path / "source", Recipe(model="tiny", default="uniform-channel-4"), tmp_path / "made")
    for name in ("vae", "text_encoder"):
        files = [path for path in (tmp_path / "source" / name).iterdir() if path.name != "config.json"]
        assert len(files) > 2 or name == "text_encoder"
        assert all(
            path.read_bytes() == (made / name / path.name).read_bytes() for path in files if path.suffix != ".json"
        )
    assert load_pipeline(made, torch_dtype=torch.float32).vae.dtype == torch.float32
    floats = {t.dtype for t in load_file(made / "unet" / WEIGHTS).values() if t.is_floating_point()}
    assert floats == {torch.float16}


# ------------------------------------------------------------------------------------------------------ going on later

RECIPE = Recipe(model="digits-dit", default="kmeans-channel-4")
EXPORT = "import sys; from quantdm import *; export_pipeline(sys.argv[1], load_recipe(sys.argv[2]), sys.argv[3])"


def partial(folder):
    """The folders that unfinished exports left."""
    return list(folder.glob(f".*{SUFFIX}"))


def count_quantized(monkeypatch):
    """Count the layers that are quantized from here on."""
    names, original = [], side_by_side.quantize_weight

    def counted(weight, scheme, **options):
        names.append(options["name"])
        return original(weight, scheme, **options)

    monkeypatch.setattr(side_by_side, "quantize_weight", counted)
    return names


def test_a_killed_export_goes_on_where_it_was(tmp_path, monkeypatch):
    RECIPE.save(tmp_path / "r.yaml")
    process = subprocess.Popen(
        [sys.executable, "-c", EXPORT, "digits-dit", str(tmp_path / "r.yaml"), str(tmp_path / "out")],
        stderr=subprocess.DEVNULL,
    )
    try:
        journal: list[Path] = []
        for _ in range(6000):
            journal = [path / FILE for path in partial(tmp_path)]
            if journal and journal[0].is_file() and len(journal[0].read_text().splitlines()) > 8:
                break
            assert process.poll() is None, "it was finished before it was killed"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "out").exists()
    finished = {json.loads(line)["layer"] for line in journal[0].read_text().splitlines() if line.endswith("}")}
    assert len(finished) >= 8
    names = count_quantized(monkeypatch)
    made = export_pipeline("digits-dit", RECIPE, tmp_path / "out")
    assert not finished & set(names)
    live = apply_recipe(load_pipeline("digits-dit", torch_dtype=torch.float16), RECIPE, insist=True)
    live.transformer.save_pretrained(tmp_path / "live")
    assert equal_files(made / "transformer" / WEIGHTS, tmp_path / "live" / WEIGHTS)
    assert not partial(tmp_path)


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """A lone denoiser whose export was interrupted after some layers; the source, the place and the finished layers."""
    make_unet().to(torch.bfloat16).save_pretrained(tmp_path / "source")
    recipe, original, names = Recipe(model="tiny", default="uniform-channel-4"), side_by_side.quantize_weight, []

    def until_ctrl_c(weight, scheme, **options):
        names.append(options["name"])
        if len(names) > 12:
            raise KeyboardInterrupt
        return original(weight, scheme, **options)

    with monkeypatch.context() as patch:
        patch.setattr(side_by_side, "quantize_weight", until_ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            export_pipeline(tmp_path / "source", recipe, tmp_path / "out")
    assert len(partial(tmp_path)) == 1
    journal = (partial(tmp_path)[0] / FILE).read_text()
    return tmp_path, recipe, {json.loads(line)["layer"] for line in journal.splitlines() if line}


def test_a_layer_whose_weight_has_changed_is_quantized_again(interrupted, monkeypatch):
    folder, recipe, finished = interrupted
    file, changed = folder / "source" / WEIGHTS, sorted(finished)[0]
    tensors = load_file(file)
    tensors[f"{changed}.weight"] *= 2
    save_file(tensors, file, metadata={"format": "pt"})
    names = count_quantized(monkeypatch)
    made = export_pipeline(folder / "source", recipe, folder / "out")
    assert set(names) & finished == {changed}
    fresh = export_pipeline(folder / "source", recipe, folder / "fresh")
    assert equal_files(made / WEIGHTS, fresh / WEIGHTS)


def test_damaged_bytes_of_a_finished_layer_are_written_again(interrupted, monkeypatch):
    folder, recipe, finished = interrupted
    file = next(partial(folder)[0].rglob("*.safetensors"))
    file.write_bytes(bytes(file.stat().st_size))
    with (partial(folder)[0] / FILE).open("a") as journal:
        journal.write('\n{"part": "", "lay')  # cut off by a kill
    names = count_quantized(monkeypatch)
    made = export_pipeline(folder / "source", recipe, folder / "out")
    assert finished <= set(names)
    fresh = export_pipeline(folder / "source", recipe, folder / "fresh")
    assert equal_files(made / WEIGHTS, fresh / WEIGHTS)


def test_another_recipe_starts_afresh_and_leaves_nothing_behind(interrupted):
    folder, _, _ = interrupted
    export_pipeline(folder / "source", Recipe(model="tiny", default="uniform-channel-3"), folder / "out")
    assert not partial(folder)


def test_two_processes_do_not_write_one_export(interrupted):
    folder, recipe, _ = interrupted
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); "
    holder = subprocess.Popen(
        [sys.executable, "-c", code + "time.sleep(60)", str(partial(folder)[0] / FILE)], stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(QuantDMError, match="another process is writing"):
            export_pipeline(folder / "source", recipe, folder / "out")
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()  # type: ignore[union-attr]
    export_pipeline(folder / "source", recipe, folder / "out")


# ------------------------------------------------------------------------------------------------------------- refusals


def test_bad_input_is_refused_and_leaves_nothing(tmp_path):
    model = make_unet()
    with torch.no_grad():
        model.conv_in.weight[0, 0, 0, 0] = torch.nan  # type: ignore[union-attr,index]
    model.save_pretrained(tmp_path / "nan")
    make_unet().save_pretrained(tmp_path / "float8")
    state = load_file(tmp_path / "float8" / WEIGHTS)
    state["conv_in.weight"] = state["conv_in.weight"].to(torch.float8_e4m3fn)
    save_file(state, tmp_path / "float8" / WEIGHTS)
    cases = {
        "nan": ("uniform-channel-4", "conv_in.*NaN"),
        "float8": ("uniform-channel-4", "float8_e4m3fn, expected float32"),
        "digits-dit": ("kmeans-channel-4-importance", "does not say on what"),
    }
    for name, (label, message) in cases.items():
        source = name if name == "digits-dit" else tmp_path / name
        with pytest.raises(QuantDMError, match=message):
            export_pipeline(source, Recipe(model="tiny", default=label), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float8", "nan"]


# -------------------------------------------------------------------------------------------------------------- memory


def empty_files(name, folder):
    """A denoiser of public size in bf16 whose files are holes: gigabytes that take no room."""
    kind, arguments = PUBLIC[name]
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**arguments)
    folder.mkdir()
    state = {key: tensor.to(torch.bfloat16) for key, tensor in model.state_dict().items()}
    layout = lay_out(state)
    header = layout.header({"format": "pt"})
    with (folder / WEIGHTS).open("wb") as file:
        file.write(header)
        file.truncate(len(header) + layout.nbytes)
    model.save_config(folder)
    return sum(tensor.numel() for tensor in state.values())


def test_inspect_reads_no_weight(tmp_path, monkeypatch):
    weights = empty_files("sdxl", tmp_path / "unet")

    def read(path, *_):
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(tensor_files, "_read", read)
    record = inspect_target(str(tmp_path / "unet"))
    assert 2.5e9 < record["num_weights"] < weights < 2.6e9
    assert record["file_bytes"] == pytest.approx(2 * weights, rel=1e-3)


def test_what_was_measured_of_large_models_stays_within_four_gigabytes():
    results = Path(__file__).parents[1] / "eval" / "results"
    for model in ("sdxl", "flux"):
        record = json.loads((results / "bench_streaming.json").read_text())[model]
        assert record["inspect"]["peak_gb"] <= 1
        assert all(each["peak_gb"] <= 4 for each in record["exports"].values())
    search = json.loads((results / "search_sdxl.json").read_text())
    assert search["above_the_model_gb"]["anonymous"] <= 4
    assert [*search["stages"]] == ["bank", "sensitivities", "trials", "choice"]
