"""What a pipeline or a denoiser may be read from: folders, single files, variants, the hub's cache; or a clear word."""

import json
import os
import shutil

import pytest
import torch
from diffusers import AuraFlowTransformer2DModel, AutoencoderKL, DDIMScheduler, DiTPipeline
from diffusers.loaders.single_file_utils import convert_auraflow_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from quantdm import QuantDMError, Recipe, export_pipeline, load_pipeline
from quantdm.cli.main import app
from quantdm.hub.apply import apply_recipe
from quantdm.hub.inspection import inspect_target
from quantdm.hub.replace import why_no_export
from quantdm.pipelines.single_file import Recorded
from quantdm.pipelines.source import open_source
from tests.hub_models import WEIGHTS, equal_files, load, make_dit, make_unet

RECIPE = Recipe(model="tiny", default="uniform-channel-3")


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    """The folder of a lone denoiser in bf16, and what quantizing it in memory gives."""
    folder = tmp_path_factory.mktemp("unet")
    make_unet().to(torch.bfloat16).save_pretrained(folder / "unet")
    live = load(folder / "unet", torch_dtype=torch.bfloat16)
    apply_recipe(live, RECIPE, insist=True).save_pretrained(folder / "live")
    return folder


def make_pipe():
    """A tiny DiT pipeline."""
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    return DiTPipeline(make_dit(), vae, DDIMScheduler())


def test_the_folder_of_a_lone_denoiser(unet, tmp_path):
    made = export_pipeline(unet / "unet", RECIPE, tmp_path / "made")
    assert equal_files(made / WEIGHTS, unet / "live" / WEIGHTS)
    load(made)
    rows = inspect_target(str(made))["layers"]
    assert {row["scheme"] for row in rows} == {"uniform-channel-3"}
    assert [row["name"] for row in rows] == [row["name"] for row in inspect_target(str(unet / "unet"))["layers"]]
    assert why_no_export(made) is None
    export_pipeline(unet / "unet", RECIPE, made)  # replaces what is provably its own
    (made / "notes.txt").write_text("mine")
    with pytest.raises(QuantDMError, match=r"notes\.txt, which no export writes"):
        export_pipeline(unet / "unet", RECIPE, made)


def test_a_file_with_its_configuration_beside_it_or_named(unet, tmp_path):
    file = tmp_path / "alone" / "some name.safetensors"
    file.parent.mkdir()
    shutil.copy(unet / "unet" / WEIGHTS, file)
    arguments = ["apply", "--recipe", str(RECIPE.save(tmp_path / "r.yaml")), "-o"]
    for config in (unet / "unet", unet / "unet" / "config.json"):
        out = tmp_path / f"named {config.name}"
        result = CliRunner().invoke(app, [*arguments, str(out), str(file), "--config", str(config)])
        assert result.exit_code == 0, result.output
        assert equal_files(out / WEIGHTS, unet / "live" / WEIGHTS)
    made = export_pipeline(unet / "unet" / WEIGHTS, RECIPE, tmp_path / "beside")
    assert equal_files(made / WEIGHTS, unet / "live" / WEIGHTS)
    record = inspect_target(str(file), config=unet / "unet", scheme="uniform-channel-3")
    assert min(row["sqnr_db"] for row in record["layers"]) > 3
    with pytest.raises(QuantDMError, match="goes with a single safetensors file"):
        open_source(unet / "unet", config=unet / "unet")


# ------------------------------------------------------------------------------------------------- authors' own names


AURA = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
    "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16,
    "out_channels": 4, "pos_embed_max_size": 64,
}  # fmt: skip


def aura_names(layers, single_layers):
    """Name in the authors' file -> name in diffusers."""
    names = {
        "register_tokens": "register_tokens", "positional_encoding": "pos_embed.pos_embed",
        "init_x_linear.weight": "pos_embed.proj.weight", "init_x_linear.bias": "pos_embed.proj.bias",
        "t_embedder.mlp.0.weight": "time_step_proj.linear_1.weight",
        "t_embedder.mlp.0.bias": "time_step_proj.linear_1.bias",
        "t_embedder.mlp.2.weight": "time_step_proj.linear_2.weight",
        "t_embedder.mlp.2.bias": "time_step_proj.linear_2.bias",
        "cond_seq_linear.weight": "context_embedder.weight", "final_linear.weight": "proj_out.weight",
        "modF.1.weight": "norm_out.linear.weight",
    }  # fmt: skip
    ff = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}
    attn = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
    context = {"q": "add_q_proj", "k": "add_k_proj", "v": "add_v_proj", "o": "to_add_out"}
    for i in range(layers):
        old, new = f"double_layers.{i}", f"joint_transformer_blocks.{i}"
        names |= {f"{old}.mlp{x}.{a}.weight": f"{new}.{y}.{b}.weight" for x, y in (("X", "ff"), ("C", "ff_context"))
                  for a, b in ff.items()}  # fmt: skip
        names |= {
            f"{old}.mod{x}.1.weight": f"{new}.{y}.linear.weight" for x, y in (("X", "norm1"), ("C", "norm1_context"))
        }
        names |= {f"{old}.attn.w2{a}.weight": f"{new}.attn.{b}.weight" for a, b in attn.items()}
        names |= {f"{old}.attn.w1{a}.weight": f"{new}.attn.{b}.weight" for a, b in context.items()}
    for i in range(single_layers):
        old, new = f"single_layers.{i}", f"single_transformer_blocks.{i}"
        names |= {f"{old}.mlp.{a}.weight": f"{new}.ff.{b}.weight" for a, b in ff.items()}
        names |= {f"{old}.modCX.1.weight": f"{new}.norm1.linear.weight"}
        names |= {f"{old}.attn.w1{a}.weight": f"{new}.attn.{b}.weight" for a, b in attn.items()}
    return names


@pytest.fixture(scope="module")
def aura(tmp_path_factory):
    """A tiny AuraFlow in a file as its authors publish it, and the model that diffusers makes of it."""
    folder = tmp_path_factory.mktemp("aura")
    torch.manual_seed(0)
    model = AuraFlowTransformer2DModel(**AURA)
    state = model.state_dict()
    names = aura_names(AURA["num_mmdit_layers"], AURA["num_single_dit_layers"])
    assert {*names.values()} == state.keys()
    tensors = {old: state[new].to(torch.bfloat16).contiguous() for old, new in names.items()}
    save_file(tensors, folder / "aura.safetensors")
    model.save_config(folder / "config")
    model.load_state_dict(convert_auraflow_transformer_checkpoint_to_diffusers(dict(tensors)))
    return folder, model.to(torch.bfloat16)


def test_a_file_under_its_authors_names_is_converted_as_it_is_read(aura, tmp_path):
    folder, live = aura
    made = export_pipeline(folder / "aura.safetensors", RECIPE, tmp_path / "made", config=folder / "config")
    apply_recipe(live, RECIPE, insist=True).save_pretrained(tmp_path / "live")
    assert equal_files(made / WEIGHTS, tmp_path / "live" / WEIGHTS)


def test_recorded_operations_give_what_they_give_at_once():
    real = {name: torch.randn(6, 4, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("ab")}
    read = []

    def recorded(name):
        def make_it():
            read.append(name)
            return real[name]

        return Recorded(real[name].to("meta"), make_it)

    def convert(a, b):
        q, k, v = torch.chunk(a, 3, dim=0)
        return {"q": q, "kv": torch.cat([k, v]), "b": b[:2].reshape(4, 2).t(), "sum": q + b[:2] * 2}

    lazy = convert(recorded("a"), recorded("b"))
    assert not read
    for name, value in convert(real["a"], real["b"]).items():
        assert (lazy[name].shape, lazy[name].dtype) == (value.shape, value.dtype)
        assert torch.equal(lazy[name].make(), value)
    with pytest.raises(QuantDMError, match="in place"):
        recorded("a").mul_(2)


# ------------------------------------------------------------------------------------------------ variants and the hub


def test_the_only_variant_is_found_and_one_of_several_is_named(tmp_path):
    pipe = make_pipe()
    pipe.save_pretrained(tmp_path / "both")
    for part in (pipe.transformer, pipe.vae):
        part.to(torch.float16)
    pipe.save_pretrained(tmp_path / "only", variant="fp16", max_shard_size="40KB")
    pipe.save_pretrained(tmp_path / "both", variant="fp16")
    apply_recipe(load_pipeline(tmp_path / "only", torch_dtype=torch.float16), RECIPE, insist=True).save_pretrained(
        tmp_path / "live"
    )
    expected = tmp_path / "live" / "transformer" / WEIGHTS
    for source, variant in (("only", None), ("only", "fp16"), ("both", "fp16")):
        made = export_pipeline(tmp_path / source, RECIPE, tmp_path / "made", variant=variant)
        assert equal_files(made / "transformer" / WEIGHTS, expected)
        assert not [path for path in made.rglob("*") if "fp16" in path.name]
        copied = load_pipeline(made).vae.state_dict()
        assert all(torch.equal(value, copied[key].half()) for key, value in pipe.vae.state_dict().items())
    made = export_pipeline(tmp_path / "both", RECIPE, tmp_path / "made")
    assert not equal_files(made / "transformer" / WEIGHTS, expected)
    both = inspect_target(str(tmp_path / "both" / "transformer"))["file_bytes"]
    half = inspect_target(str(tmp_path / "both" / "transformer"), variant="fp16")["file_bytes"]
    assert half < 0.7 * both


def test_a_snapshot_of_the_hub_is_a_folder_of_links(tmp_path):
    pipe = make_pipe()
    pipe.save_pretrained(tmp_path / "plain")
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    for i, path in enumerate(sorted(p for p in (tmp_path / "plain").rglob("*") if p.is_file())):
        shutil.copy(path, blobs / str(i))
        link = snapshot / path.relative_to(tmp_path / "plain")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(i), link.parent))
    made = export_pipeline(snapshot, RECIPE, tmp_path / "made")
    plain = export_pipeline(tmp_path / "plain", RECIPE, tmp_path / "made plain")
    assert equal_files(made / "transformer" / WEIGHTS, plain / "transformer" / WEIGHTS)
    assert not [path for path in made.rglob("*") if path.is_symlink()]
    shutil.rmtree(blobs)
    load_pipeline(made)


# --------------------------------------------------------------------------------------------------- what is no source


def broken(unet, folder):
    """Sources that are none, each with what the error says."""
    folder.mkdir()
    weights = unet / "unet" / WEIGHTS
    (folder / "model.ckpt").write_bytes(b"\x80\x02")
    yield folder / "model.ckpt", {}, "expected a .safetensors file"
    (folder / "text.safetensors").write_text("hello, this is no header")
    yield folder / "text.safetensors", {}, "damaged or not a safetensors file"
    (folder / "cut.safetensors").write_bytes(weights.read_bytes()[:-100])
    yield folder / "cut.safetensors", {"config": unet / "unet"}, "cut off"
    save_file({"a": torch.zeros(2, 2)}, folder / "foreign.safetensors")
    yield (
        folder / "foreign.safetensors",
        {"config": unet / "unet"},
        "its weights are not those of a UNet2DConditionModel: conv_in.weight is missing",
    )
    yield unet / "live" / WEIGHTS, {}, "file of an export of quantdm"
    yield unet / "live", {}, "is quantized already"
    (folder / "bare").mkdir()
    shutil.copy(unet / "unet" / "config.json", folder / "bare")
    yield folder / "bare", {}, "no diffusion_pytorch_model.safetensors"
    shutil.copytree(unet / "unet", folder / "other")
    config = json.loads((folder / "other" / "config.json").read_text()) | {"block_out_channels": [8, 16]}
    (folder / "other" / "config.json").write_text(json.dumps(config))
    yield folder / "other", {}, "its weights are not those of a UNet2DConditionModel: .* expected"
    yield folder / "nowhere", {}, "expected a directory, a hub id"


def test_what_is_no_source_is_refused_in_one_clear_word(unet, tmp_path):
    for source, options, message in broken(unet, tmp_path / "broken"):
        before = source.stat().st_size if source.is_file() else 0
        with pytest.raises(QuantDMError, match=message) as caught:
            export_pipeline(source, RECIPE, tmp_path / "out", **options)
        assert "delete" not in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not source.is_file() or source.stat().st_size == before
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_nothing_that_is_looked_at_is_to_be_deleted(unet, tmp_path):
    file = tmp_path / "config.json"
    file.write_text("no json")
    for target in (str(file), str(tmp_path)):
        with pytest.raises(QuantDMError) as caught:
            inspect_target(target)
        assert "delete" not in str(caught.value)
    with pytest.raises(QuantDMError, match="a lone denoiser or a file of its weights can be inspected"):
        load_pipeline(unet / "unet")
    with pytest.raises(QuantDMError, match="is a file, expected the directory of a pipeline"):
        load_pipeline(unet / "unet" / WEIGHTS)
    result = CliRunner().invoke(app, ["apply", str(unet / "unet"), "--recipe", str(RECIPE.save(tmp_path / "r.yaml")),
                                      "-o", str(tmp_path / "out"), "--model-card"])  # fmt: skip
    assert isinstance(result.exception, QuantDMError)
    assert "is for pipelines" in str(result.exception)


def test_a_network_under_old_names_is_opened_whole_and_quantized_all_the_same(tmp_path):
    pipe = make_pipe()
    pipe.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "vae" / WEIGHTS
    tensors = load_file(file)
    save_file(tensors | {"spare": torch.zeros(1)}, file)  # what nothing asks for: diffusers drops it
    recipe = Recipe(model="tiny", default="uniform-channel-3", components={"vae": {"default": "uniform-channel-4"}})
    with pytest.warns(UserWarning, match="vae: is opened whole"):
        made = export_pipeline(tmp_path / "source", recipe, tmp_path / "made")
    assert "QuantConv2d" in repr(load_pipeline(made).vae)
