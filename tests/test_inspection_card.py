"""The model card: a valid head, a snippet that runs, the measured table or the word that there is none."""

import runpy

import pytest
import yaml
from typer.testing import CliRunner

from quantdm import QuantDMError, get_denoiser, list_layers, load_pipeline, load_recipe
from quantdm.cli.main import app
from quantdm.files import write_json
from quantdm.hub.export import configuration_digest
from quantdm.hub.model_card import write_card

RECIPE = """
version: 1
model: MODEL
default: log2-channel-4
provenance: {source: "published insight, not measured here", reference: a paper}
"""
SUMMARY = {
    "version": 1,
    "protocol": {
        "images": 1000, "draws": [101, 102], "steps": 20, "guidance_scale": 2.0, "features": "digits",
        "fid": "Frechet distance of classifier features, float64, no resize",
    },
    "fp_noise": {"mean": 0.02, "sd": 0.001},
    "rows": [
        {"name": "fp", "avg_bits": 16.0, "denoiser_bytes": 8_400_000, "fid_fp": 0.0, "fid_fp_sd": 0.0, "psnr_fp": None},
        {"name": "recipe", "avg_bits": 4.2, "denoiser_bytes": 3_100_000, "fid_fp": 0.0712, "fid_fp_sd": 0.004,
         "psnr_fp": 21.84, "fid_real": 0.163},
    ],
}  # fmt: skip


@pytest.fixture(scope="module", params=["digits-dit", "digits-flow", "digits-sd"])
def export(request, tmp_path_factory):
    """An export with its card, made by the command line."""
    folder = tmp_path_factory.mktemp("card")
    (folder / "recipe.yaml").write_text(RECIPE.replace("MODEL", request.param))
    arguments = ["apply", request.param, "--recipe", str(folder / "recipe.yaml"), "-o", str(folder / "small")]
    result = CliRunner().invoke(app, [*arguments, "--model-card"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return request.param, folder / "small"


def parts(folder):
    """The head of a card as data, and its sections by title."""
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    sections = dict(section.split("\n", 1) for section in text.split("\n## ")[1:])
    return yaml.safe_load(head), text, sections


def test_a_card_says_what_it_is_and_that_nothing_was_measured(export):
    model, folder = export
    head, text, sections = parts(folder)
    assert head["library_name"] == "diffusers"
    assert head["pipeline_tag"] == ("unconditional-image-generation" if model == "digits-dit" else "text-to-image")
    assert "base_model" not in head  # no name on the Hub
    assert list(sections) == ["Load it", "Results", "Recipe", "Limits"]
    size = sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))
    assert f"the weights take {size / 1e6:,.2f} MB of memory" in text
    assert "was not measured" in sections["Results"]
    assert "published insight, not measured here" in sections["Recipe"]
    assert "Reference: a paper." in sections["Recipe"]
    assert f"# {model}, 4." in text  # the bits are counted, the recipe does not state them
    recipe = sections["Recipe"].split("```yaml\n")[1].split("```")[0]
    (folder.parent / "again.yaml").write_text(recipe)
    assert load_recipe(folder.parent / "again.yaml") == load_recipe(folder / "recipe.yaml")


def test_the_snippet_of_a_card_runs(export, monkeypatch, tmp_path):
    _, folder = export
    code = parts(folder)[2]["Load it"].split("```python\n")[1].split("```")[0]
    (tmp_path / "snippet.py").write_text(code.replace(").images", ", num_inference_steps=1).images"))
    monkeypatch.chdir(folder.parent)
    assert runpy.run_path(str(tmp_path / "snippet.py"))["image"].width >= 32


def summary_of(model, recipe, activations=None):
    """A summary whose second row measured a recipe."""
    layers = list_layers(get_denoiser(load_pipeline(model)))
    digest = configuration_digest(recipe.resolve(layers).to_labels(), activations, None)
    fp, row = SUMMARY["rows"]
    return {
        **SUMMARY,
        "model": model,
        "rows": [{**fp, "configuration": None}, {**row, "configuration": digest}],
    }


def test_a_measured_export_shows_its_table_with_the_protocol(export, tmp_path):
    model, folder = export
    recipe = load_recipe(folder / "recipe.yaml")
    write_json(tmp_path / "summary.json", summary_of(model, recipe))
    card = write_card(folder, summary=tmp_path / "summary.json")
    results = parts(folder)[2]["Results"]
    assert "| recipe | 4.20 | 3.10 MB | 0.0712 ± 0.0040 | 21.8 dB | 0.163 |" in results
    assert "| fp | 16.00 | 8.40 MB | 0.0000 ± 0.0000 | - | - |" in results
    assert "2 draws of 1000 images (seeds 101, 102), 20 steps" in results
    before = card.read_text()
    other = recipe.override(["*=log2-channel-5"])
    without = {**SUMMARY, "model": model}  # of an older quantdm
    for summary, expected in (
        ({**summary_of(model, recipe), "model": "another"}, "was measured on another"),
        (summary_of(model, other), "measured other recipes"),
        (summary_of(model, recipe, {"bits": 6, "keep_8bit": []}), "measured other recipes"),
        (without, "does not say which recipes it measured"),
    ):
        write_json(tmp_path / "summary.json", summary)
        with pytest.raises(QuantDMError, match=expected):
            write_card(folder, summary=tmp_path / "summary.json")
        assert card.read_text() == before


def test_a_card_that_somebody_wrote_or_changed_is_not_replaced(export):
    _, folder = export
    card = write_card(folder)
    assert write_card(folder).read_text() == card.read_text()
    for text in (card.read_text().replace("## Limits", "## My limits"), "# By hand\n"):
        card.write_text(text)
        with pytest.raises(QuantDMError, match="not as quantdm wrote it"):
            write_card(folder)
        assert card.read_text() == text
    card.unlink()
    write_card(folder)


def test_a_card_needs_an_export(tmp_path):
    with pytest.raises(QuantDMError, match=r"no model_index\.json"):
        write_card(tmp_path)
