"""What `inspect`, `doctor`, `apply --set`, `import` and `schema` print: right figures, plain data, 79 columns."""

import csv
import io
import json
import pickle

import diffusers
import pytest
from typer.testing import CliRunner

from quantdm import QuantDMError, get_denoiser, load_pipeline, load_recipe
from quantdm.cli.layer_table import layers_text
from quantdm.cli.main import app
from quantdm.denoisers.inventory import list_layers
from quantdm.hub.inspection import inspect_target
from quantdm.modules import packed_layers
from quantdm.pipelines.known import EMBEDDED
from quantdm.pipelines.skeleton import open_skeleton
from quantdm.quantizers import count_bits
from quantdm.schemes import Scheme

RECIPE = """
version: 1
model: digits-sd
default: original
types: {attn1.to_q: log2-channel-3}
patterns: {"up_blocks.*.conv1": log2-channel-4}
components:
  text_encoder: {default: log2-tensor-4}
provenance: {source: made up}
"""


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A recipe with a component, and what `apply` made of it."""
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "recipe.yaml").write_text(RECIPE)
    arguments = [
        "--recipe",
        str(folder / "recipe.yaml"),
        "--set",
        "mid_block.*.conv2=log2-channel-5",
        "-o",
        str(folder / "out"),
    ]
    said = run("apply", "digits-sd", *arguments)
    before, after = (
        sum(file.stat().st_size for file in place.glob("*/*.safetensors")) / 1e6
        for place in (EMBEDDED / "digits-sd", folder / "out")
    )
    assert f"weights on disk, all parts: {before:.2f} MB before, {after:.2f} MB now" in said
    return folder


def run(*arguments):
    """Run a command in this process and return what it prints on standard output."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def narrow(text):
    """Whether every line has 79 columns or less."""
    return all(len(line) <= 79 for line in text.splitlines())


def test_a_recipe_file_and_its_export_show_the_same_layers(export):
    shown = inspect_target(str(export / "recipe.yaml"), overrides=["mid_block.*.conv2=log2-channel-5"])
    made = inspect_target(str(export / "out"))
    labels = {row["name"]: (row["scheme"], row["num_bits"], row["nbytes"], row["shape"]) for row in shown["layers"]}
    assert {
        row["name"]: (row["scheme"], row["num_bits"], row["nbytes"], row["shape"]) for row in made["layers"]
    } == labels
    assert labels["mid_block.resnets.0.conv2"][0] == "log2-channel-5"
    assert labels["text_encoder:encoder.layers.0.mlp.fc1"][0] == "log2-tensor-4"
    assert (shown["avg_bits"], shown["weight_bytes"]) == (made["avg_bits"], made["weight_bytes"])
    assert all((row["sqnr_db"] is None) == (row["scheme"] is None) for row in shown["layers"])
    assert all("sqnr_db" not in row for row in made["layers"])
    assert shown["file_bytes"] > made["file_bytes"] > made["weight_bytes"]
    for row in shown["layers"]:
        if row["scheme"] is not None and row["quantizers"] == 1:
            assert row["num_bits"] == count_bits(row["shape"], Scheme.parse(row["scheme"]))
    for record in (shown, made):
        text = layers_text(record)
        assert narrow(text)
        assert f"{record['num_weights']:,} weights, {record['avg_bits']:.4f} bits per weight" in text.replace("\n", " ")
    assert "recipe: made up; then changed by mid_block" in layers_text(shown)


def test_packed_layers_of_an_export_are_those_of_the_recipe(export):
    pipe = load_pipeline(export / "out")
    recipe = load_recipe(export / "out/recipe.yaml")
    resolved = recipe.resolve(list_layers(get_denoiser(pipe)))
    packed = {name: layer.scheme for name, layer in packed_layers(get_denoiser(pipe)).items()}
    assert packed == {name: scheme for name, scheme in resolved.items() if scheme is not None}


def test_csv_and_json_are_plain_data():
    record = json.loads(
        run("inspect", "digits-dit", "--scheme", "log2-tensor-4", "--set", "proj_out*=original", "--json")
    )
    rows = list(csv.DictReader(io.StringIO(run("inspect", "digits-dit", "--scheme", "log2-tensor-4", "--csv"))))
    assert [row["name"] for row in rows] == [row["name"] for row in record["layers"]]
    assert {(row["kind"], row["scheme"]) for row in rows} == {
        ("weight", "log2-tensor-4"), ("embedding", "uniform-channel-8")
    }  # fmt: skip
    assert [row["name"] for row in record["layers"] if row["scheme"] is None] == ["proj_out_1", "proj_out_2"]
    assert float(rows[0]["sqnr_db"]) == record["layers"][0]["sqnr_db"] > 10


@pytest.mark.parametrize("target", ["digits-dit", "digits-sd", "recipes/dit-xl-2-3.5bit.yaml"])
def test_tables_have_79_columns_and_their_totals_add_up(target, tmp_path):
    arguments = [target]
    if target.startswith("recipes"):  # of a model that is not here: its configuration is enough
        with_config = tmp_path / "config.json"
        config = {
            "_class_name": "DiTTransformer2DModel", "num_layers": 21, "num_attention_heads": 16, "sample_size": 32,
            "attention_head_dim": 72, "patch_size": 2, "in_channels": 4, "out_channels": 8,
        }  # fmt: skip
        with_config.write_text(json.dumps(config))
        arguments += ["--model", str(with_config)]
    text = run("inspect", *arguments)
    assert narrow(text)
    shares = [float(line.split(" % of")[0].split()[-1]) for line in text.splitlines() if " % of the weights" in line]
    assert sum(shares) == pytest.approx(100, abs=0.02 * len(shares))
    assert ("published insight, not measured here" in text) == (len(arguments) > 1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target": "digits-dit", "overrides": ["*=log2-tensor-4"]}, "--scheme, --recipe or a recipe file"),
        ({"target": "digits-dit", "model": "digits-sd"}, "goes with a recipe file"),
        ({"target": "recipe.yaml", "scheme": "log2-tensor-4"}, "one of"),
        (
            {"target": "digits-dit", "scheme": "log2-tensor-4", "overrides": ["*.attn1.to_x=original"]},
            r"matches no layer \(.*attn1\.to_",
        ),
    ],
)
def test_inspect_says_what_it_wants(options, expected):
    with pytest.raises(QuantDMError, match=expected):
        inspect_target(**options)


def test_a_skeleton_comes_from_a_pipeline_a_directory_or_a_config_file(tmp_path):
    unet = diffusers.UNet2DModel(block_out_channels=(8, 16), down_block_types=("DownBlock2D",) * 2, norm_num_groups=4,
                                 up_block_types=("UpBlock2D",) * 2, sample_size=8)  # fmt: skip
    unet.save_config(tmp_path)
    expected = [layer.name for layer in list_layers(unet)]
    for where in (tmp_path, tmp_path / "config.json"):
        skeleton = open_skeleton(where)
        assert all(p.is_meta for p in skeleton.parameters())
        assert [layer.name for layer in list_layers(skeleton)] == expected
    assert type(open_skeleton("digits-sd")).__name__ == "UNet2DConditionModel"
    (tmp_path / "config.json").write_text('{"_class_name": "MyUNet"}')
    with pytest.raises(QuantDMError, match="MyUNet, which diffusers"):
        open_skeleton(tmp_path)
    with pytest.raises(QuantDMError, match="digits-dit, digits-flow, digits-sd"):
        open_skeleton(tmp_path / "nowhere")


def test_import_writes_a_recipe_or_trials(tmp_path):
    names = [layer.name for layer in list_layers(open_skeleton("digits-dit"))]
    config = {f"model.{name}.weight_quantizer": "kmeans-3" for name in names}
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(config))
    trial = {"config": {key: ["mse-4", 4, 1, 0.1] for key in config}, "FID-GT-1k": 31.5}
    (tmp_path / "quant_cache.pkl").write_bytes(pickle.dumps([trial]))
    model = ("--model", "digits-dit")
    assert "bits per weight" in run("import", str(tmp_path / "config.pkl"), *model, "-o", str(tmp_path / "r.yaml"))
    assert set(load_recipe(tmp_path / "r.yaml").layers.values()) == {"kmeans-channel-3-fp16"}
    assert "(1 record)" in run("import", str(tmp_path / "quant_cache.pkl"), *model, "-o", str(tmp_path / "trials"))
    assert len(list((tmp_path / "trials").glob("*.json"))) == 1


def test_schema_is_json():
    assert json.loads(run("schema"))["title"] == "quantdm recipe"


def test_doctor_says_what_is_fast_and_what_is_missing():
    text = run("doctor")
    assert narrow(text)
    record = json.loads(run("doctor", "--json"))
    assert "GFLOP/s" in record["matrix products"]
    assert "million weights/s" in record["decoding"]
    assert {"torch", "diffusers", "processor", "accelerator", "torch.compile", "missing"} <= record.keys()
