"""Recipes by hand: precedence, patterns, inheritance, components, and every bad file refused with its line."""

import json
import re
from dataclasses import dataclass

import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline

from quantdm import QuantDMError, Recipe, apply_recipe, get_denoiser, load_pipeline, load_recipe
from quantdm.denoisers.inventory import list_layers
from quantdm.hub import QuantDMConfig
from quantdm.modules import packed_layers
from quantdm.recipe import ActivationScheme, ActivationSpec, CalibrationSpec, Provenance, recipe_schema


@dataclass(frozen=True)
class Layer:
    """A layer as rules see it."""

    name: str
    op_type: str


LAYERS = [
    Layer(f"blocks.{i}.{t}", t) for i in range(3) for t in ("attn1.to_q", "attn1.to_k", "ff.net.2")
] + [Layer("proj_out", "proj_out")]  # fmt: skip
U3, U4, K3, K4 = "uniform-channel-3", "uniform-channel-4", "kmeans-channel-3", "kmeans-channel-4"


def recipe(**fields):
    """A recipe for a model that does not matter."""
    return Recipe(model="m", **fields)


def labels(rules):
    """The scheme of every layer, as labels."""
    return rules.resolve(LAYERS).to_labels()


def test_exact_names_beat_patterns_beat_types_beat_the_default():
    rules = recipe(
        default=K4,
        types={"ff.net.2": U4},
        patterns={"blocks.1.*": K3, "*.ff.net.2": "log2-channel-4", "*.to_k": "original"},
        layers={"blocks.1.attn1.to_q": None},
    )
    found = labels(rules)
    assert found["blocks.1.attn1.to_q"] is None  # exact, though a pattern matches
    assert found["blocks.1.ff.net.2"] == K3  # the first of two patterns
    assert found["blocks.0.ff.net.2"] == "log2-channel-4"  # a pattern, though the type is known
    assert found["blocks.0.attn1.to_k"] is None
    assert found["blocks.0.attn1.to_q"] == found["proj_out"] == K4
    assert labels(recipe(default="original", types={"ff.net.2": U4}))["blocks.2.ff.net.2"] == U4
    assert list(found) == [layer.name for layer in LAYERS]


def test_a_regular_expression_matches_whole_names():
    found = labels(recipe(patterns={r"re:blocks\.[02]\..*to_[qk]": K3, "*": K4}))
    assert [name for name, label in found.items() if label == K3] == [
        f"blocks.{i}.attn1.to_{x}" for i in (0, 2) for x in "qk"
    ]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"patterns": {"*.to_kk": K3, "*": K4}}, r"'\*\.to_kk' matches no layer \(known: .*to_k"),
        ({"patterns": {"block.0.*": K3, "*": K4}}, r"'block\.0\.\*' matches no layer \(known: blocks\.0, blocks\.1"),
        ({"patterns": {"re:block.0.*": K3, "*": K4}}, "matches no layer"),
        ({"types": {"attn1.to_p": K3}, "default": K4}, r"no type 'attn1\.to_p' \(known: .*attn1\.to_q"),
        ({"layers": {"blocks.7.ff.net.2": K3}, "default": K4}, r"no layer 'blocks\.7\.ff\.net\.2' \(nearest: blocks"),
        ({"patterns": {"*.attn1.*": K4}}, r"no scheme for 4 layers.*first blocks\.0\.ff\.net\.2.*default"),
        ({"types": {"ff.net.2": K4}}, r"no scheme for 7 layers.*first blocks\.0\.attn1\.to_q"),
        ({"layers": {"proj_out": K4}}, r"no scheme for 9 layers"),
    ],
)
def test_a_rule_that_matches_nothing_and_a_layer_without_a_scheme_name_the_nearest(fields, expected):
    with pytest.raises(QuantDMError, match=expected):
        labels(recipe(**fields))


def test_only_an_exact_recipe_is_a_config_by_itself():
    rules = recipe(default=K4, patterns={"*.to_q": K3})
    with pytest.raises(QuantDMError, match="resolve"):
        _ = rules.config
    exact = rules.exact(LAYERS)
    assert exact.config.to_labels() == exact.layers == labels(rules)


def test_overrides_win_and_drop_what_was_measured():
    measured = recipe(
        layers=dict.fromkeys((layer.name for layer in LAYERS), K4),
        avg_bits=4.1,
        correction="correction.safetensors",
        provenance=Provenance(source="searched", measured={"fid_fp": 0.1}),
    )
    changed = measured.override(
        ["*.to_q=uniform-channel-3", "re:blocks.(0|1).*to_q=original", "proj_out=log2-channel-4"]
    )
    found = labels(changed)
    assert [found[f"blocks.{i}.attn1.to_q"] for i in range(3)] == [None, None, U3]
    assert (found["proj_out"], found["blocks.0.attn1.to_k"]) == ("log2-channel-4", K4)
    assert (changed.avg_bits, changed.correction, changed.provenance.measured) == (None, None, {})
    assert "not measured" in changed.provenance.source
    assert "proj_out=log2-channel-4" in changed.provenance.source
    assert measured.override([]) is measured
    assert labels(recipe(default=K4, patterns={"*.to_q": K3}).override(["*=uniform-channel-4"])) == dict.fromkeys(
        found, U4
    )
    for bad, expected in (
        ("nothing", "PATTERN=SCHEME"),
        ("*=kmeans-9", "scheme"),
        ("re:(=" + K4, "regular expression"),
    ):
        with pytest.raises(QuantDMError, match=expected):
            measured.override([bad])
    with pytest.raises(QuantDMError, match="matches no layer"):
        labels(measured.override([f"*.to_x={K4}"]))


def test_a_file_extends_another_from_its_own_directory(tmp_path):
    (tmp_path / "base").mkdir()
    text = f"""
version: 1
model: m
default: {K4}
patterns:
  "*.to_q": {K3}
layers: {{proj_out: null}}
activations: {{bits: 8}}
avg_bits: 3.9
provenance: {{source: searched, measured: {{fid_fp: 0.1}}}}
"""
    (tmp_path / "base/base.yaml").write_text(text)
    (tmp_path / "same.yaml").write_text("extends: base/base.yaml\n")
    assert load_recipe(tmp_path / "same.yaml") == load_recipe(tmp_path / "base/base.yaml")
    (tmp_path / "child.yaml").write_text(
        f'extends: base/base.yaml\npatterns: {{"*.to_k": {U3}, "proj*": {U4}}}\nactivations: null\n'
    )
    child = load_recipe(tmp_path / "child.yaml")
    found = labels(child)
    assert (found["blocks.0.attn1.to_q"], found["blocks.0.attn1.to_k"], found["blocks.0.ff.net.2"]) == (K3, U3, K4)
    assert found["proj_out"] == U4  # the nearer file wins, also over exact names
    assert (child.activations, child.avg_bits, child.provenance.measured) == (None, None, {})
    assert "not measured" in child.provenance.source
    (tmp_path / "grandchild.yaml").write_text(f"extends: child.yaml\nmodel: n\ndefault: {U4}\n")
    grandchild = load_recipe(tmp_path / "grandchild.yaml")
    assert (grandchild.model, labels(grandchild)["blocks.0.ff.net.2"]) == ("n", U4)
    assert load_recipe(grandchild.save(tmp_path / "saved.yaml")) == grandchild


HEAD = "version: 1\nmodel: m\n"
BAD = {
    "bomb": (HEAD + "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", 4, "aliases"),
    "repeated key": (HEAD + f"layers:\n  a: {K4}\n  a: {K3}\n", 5, "line 4 already"),
    "repeated section": (HEAD + f"default: {K4}\nmodel: n\n", 4, "line 2 already"),
    "unknown key": (HEAD + f"defualt: {K4}\n", 3, "nearest: default"),
    "unknown key below": (HEAD + f"default: {K4}\nactivations:\n  bits: 6\n  keep: []\n", 4, "keep_8bit"),
    "unknown key of a component": (HEAD + f"components:\n  vae:\n    defaults: {K4}\n", 5, "known: default"),
    "list for a mapping": (HEAD + "layers: [a, b]\n", 3, "got ['a', 'b']"),
    "number for a label": (HEAD + "layers:\n  a: 4\n", 4, "got 4"),
    "unknown scheme": (HEAD + f"layers:\n  a: {K4}\n  b: kmean-channel-4\n", 5, "kmeans"),
    "bits": (HEAD + f"default: {K4}\nactivations: {{bits: 7}}\n", 4, "6 or 8"),
    "regular expression": (HEAD + f"patterns:\n  're:a(': {K4}\n", 3, "no regular expression"),
    "nesting": (HEAD + "layers: " + "[" * 9999 + "]" * 9999, 3, "nested deeper than 8"),
    "nesting without end": (HEAD + "layers: " + "{a: " * 9999, 3, "nested deeper than 8"),
    "nesting of dashes": (HEAD + "layers:\n " + "- " * 9999 + "a\n", 4, "nested deeper than 8"),
    "tag": (HEAD + "layers: !!python/object/apply:os.system ['true']\n", 3, "python/object"),
    "syntax": (HEAD + "layers: {a: b\n", 4, "correct this line"),
    "endless number": (HEAD + "avg_bits: " + "9" * 9999 + "\n", 3, "quotes"),
    "infinite number": (HEAD + f"default: {K4}\navg_bits: .inf\n", 4, "got inf"),
    "key that is no text": (HEAD + f"layers:\n  1: {K4}\n", 4, "quotes"),
    "other version": (f"model: m\nversion: 2\ndefault: {K4}\n", 2, "got 2"),
    "missing base": (HEAD + "extends: nowhere.yaml\n", 3, "no file"),
    "device as base": (HEAD + "extends: /dev/zero\n", 3, "no file"),
    "itself as base": (HEAD + "extends: recipe.yaml\n", 3, "recipe.yaml -> recipe.yaml"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_with_the_line_and_the_remedy(name, tmp_path):
    text, line, expected = BAD[name]
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(QuantDMError, match=rf"line {line}\b.*{re.escape(expected)}") as error:
        load_recipe(path)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (lambda: Recipe(model="m", default="uniform-chanel-4"), "Recipe: default: scheme: got 'uniform-chanel-4'"),
        (lambda: Recipe(model="m", **{"defualt": K4}), "Recipe: defualt: unknown key; nearest: default"),
        (lambda: Recipe(model="m", **{"activations": {"deflt": "token-6"}}), "activations.deflt: .*nearest: default"),
        (lambda: ActivationSpec(default="token-1"), "ActivationSpec: default: "),
        (lambda: ActivationScheme(bits=99), "ActivationScheme: got 99 bits"),
        (lambda: CalibrationSpec(protocol="p", images=0), "CalibrationSpec: images: .* got 0"),
    ],
)
def test_a_bad_model_written_in_python_is_one_clear_error_too(write, expected):
    with pytest.raises(QuantDMError, match=expected) as error:
        write()
    assert "\n" not in str(error.value)


def test_files_that_extend_each_other_are_refused(tmp_path):
    for a, b in (("one", "two"), ("two", "three"), ("three", "one")):
        (tmp_path / f"{a}.yaml").write_text(f"model: m\nextends: {b}.yaml\n")
    with pytest.raises(QuantDMError, match=r"three\.yaml, line 2.*one\.yaml -> two\.yaml -> three\.yaml -> one\.yaml"):
        load_recipe(tmp_path / "one.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", "NoneType"), (f"default: {K4}\n", "model: is missing"), (HEAD, "has none of layers"), ("x" * 2**21, "bytes")],
)
def test_an_incomplete_or_huge_file_says_what_is_expected(text, expected, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(QuantDMError, match=expected):
        load_recipe(tmp_path / "recipe.yaml")


def test_the_json_schema_names_every_key():
    schema = recipe_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert {"extends", "version", "model", "default", "types", "patterns", "layers", "components"} <= set(
        schema["properties"]
    )
    assert schema["additionalProperties"] is False
    assert not schema.get("required")  # a file that extends another may leave everything out


MIXED = recipe(
    default="log2-channel-4",  # quick to quantize
    patterns={"*.to_q": K3, "*.to_k": U4},
    components={
        "text_encoder": {"default": "log2-channel-6", "types": {"self_attn.q_proj": "kmeans-tensor-5"}},
        "vae": {"default": "original", "patterns": {"decoder.*": "log2-tensor-8"}},
    },
)


def test_text_encoder_and_vae_are_applied_saved_and_loaded_bit_by_bit(tmp_path):
    pipe = load_pipeline("digits-sd")
    assert apply_recipe(pipe, MIXED.save(tmp_path / "recipe.yaml"), insist=True) is pipe
    names = {name: len(packed_layers(pipe.components[name])) for name in ("unet", "text_encoder", "vae")}
    assert names["unet"] == len(list_layers(pipe.unet))
    assert names["text_encoder"] == 12
    assert set(packed_layers(pipe.vae)) == {r.name for r in list_layers(pipe.vae) if r.name.startswith("decoder.")}
    pipe.save_pretrained(tmp_path / "small")
    again = DiffusionPipeline.from_pretrained(tmp_path / "small")
    again.set_progress_bar_config(disable=True)
    assert {name: len(packed_layers(again.components[name])) for name in names} == names

    def image(one):
        generator = torch.Generator().manual_seed(0)
        return one("the digit seven", num_inference_steps=2, generator=generator, output_type="pt").images

    y = image(pipe)
    assert torch.isfinite(y).all()
    assert torch.equal(image(again), y)
    size = sum(path.stat().st_size for path in (tmp_path / "small/text_encoder").glob("*.safetensors"))
    full = sum(p.nbytes for p in load_pipeline("digits-sd").text_encoder.parameters())
    assert size < full / 2


def test_components_are_quantized_on_the_fly_by_name(tmp_path):
    pipe = load_pipeline("digits-sd")
    pipe.text_encoder.save_pretrained(tmp_path / "text_encoder")
    config = QuantDMConfig(recipe=MIXED, component="text_encoder")
    encoder = type(pipe.text_encoder).from_pretrained(tmp_path / "text_encoder", quantization_config=config)
    live = apply_recipe(pipe.text_encoder, MIXED.component("text_encoder"), insist=True)
    ids = torch.arange(3, 9)[None]
    assert torch.equal(encoder(ids).last_hidden_state, live(ids).last_hidden_state)
    pipe.unet.save_pretrained(tmp_path / "unet")
    unet = AutoModel.from_pretrained(str(tmp_path / "unet"), quantization_config=QuantDMConfig(recipe=MIXED))
    found = {name: layer.scheme.label for name, layer in packed_layers(unet).items()}
    assert found == MIXED.resolve(list_layers(pipe.unet)).to_labels()
    with pytest.raises(QuantDMError, match="has no component 'vea'"):
        QuantDMConfig(recipe=MIXED, component="vea")


@pytest.mark.parametrize(
    ("components", "expected"),
    [
        ({"text_encoder": {"default": K4}, "vea": {"default": K4}}, "'vea' is no further model"),
        ({"unet": {"default": K4}}, "'unet' is no further model"),
        ({"text_encoder": {"default": "log2-tensor-4"}, "vae": {"types": {"resnets.conv1": K4}}}, "no scheme for"),
    ],
)
def test_when_a_component_does_not_fit_nothing_is_changed(components, expected):
    pipe = load_pipeline("digits-sd")
    with pytest.raises(QuantDMError, match=expected):
        apply_recipe(pipe, recipe(default="original", patterns={"conv_in": K4}, components=components), insist=True)
    assert not any(packed_layers(pipe.components[name]) for name in ("unet", "text_encoder", "vae"))


def test_components_need_the_pipeline_and_may_stand_alone():
    pipe = load_pipeline("digits-sd")
    only = recipe(components={"text_encoder": {"default": "log2-channel-4"}})
    with pytest.raises(QuantDMError, match=r"components \(text_encoder\).*pipeline"):
        apply_recipe(get_denoiser(pipe), only, insist=True)
    apply_recipe(pipe, only, insist=True)
    assert packed_layers(pipe.text_encoder)
    assert not packed_layers(pipe.unet)
    changed = MIXED.override(["text_encoder:*.fc1=original"])
    assert changed.components["text_encoder"].patterns == {"*.fc1": None}
    assert changed.patterns == MIXED.patterns
