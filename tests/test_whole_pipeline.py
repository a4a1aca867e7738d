"""One budget for a whole pipeline: bytes of every part known beforehand, kept under the target, and spent on all."""

from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from typer.testing import CliRunner

from quantdm import QuantDMError, Recipe, Scheme, export_pipeline, look_at
from quantdm.cli.main import app
from quantdm.denoisers.analysis import trace_graph
from quantdm.files import write_json
from quantdm.hub.planned import other_parts
from quantdm.modules import packed_layers
from quantdm.pipelines.source import open_source
from quantdm.quantizers import count_bits
from quantdm.runs.room import PART_OPTIONS
from quantdm.runs.run import Run
from quantdm.runs.search import start_run
from quantdm.runs.settings import Effort
from quantdm.runs.stages import build_bank
from quantdm.runs.whole import select_pipeline
from quantdm.surrogates import SearchSpace
from quantdm.surrogates.attribution import summarise
from tests.walk_kinds import sdxl

OPTIONS = tuple(map(Scheme.parse, ("uniform-channel-3", "uniform-channel-6")))


def weight_bytes(folder: Path) -> dict[str, int]:
    """Return the bytes of the weight files of every part of an export."""
    parts = {path.parent.name for path in folder.glob("*/*.safetensors")}
    return {part: sum(path.stat().st_size for path in (folder / part).glob("*.safetensors")) for part in sorted(parts)}


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> Run:
    """A run of digits-sd whose explanation is that of the weights' errors alone."""
    run, subject = start_run(
        look_at("digits-sd"),
        tmp_path_factory.mktemp("whole") / "run",
        target_bits=5.0,
        options=OPTIONS,
        effort=Effort(label_images=4, label_steps=2, noise_images=1),
    )
    bank, layers = build_bank(run, subject), subject.layers
    bits = np.array([[count_bits(la.shape, option, la.split) for option in OPTIONS] for la in layers])
    errors = np.array([[bank.weight_error(la.name, option) for option in OPTIONS] for la in layers])
    space = SearchSpace(layers, trace_graph(subject.denoiser), OPTIONS, bits, errors, errors)
    space.save(run.path("space.json"))
    record = summarise("additive", space, -errors, 0 * errors).to_dict()
    write_json(run.path("attribution.json"), {"version": 1, "attributions": {"additive": record}})
    return run


@pytest.mark.parametrize("target", [2_850_000, 3_600_000])
def test_a_budget_is_spent_on_all_parts_and_met_to_the_byte(searched, tmp_path, target) -> None:
    split = select_pipeline(searched, target_bytes=target)
    made = export_pipeline("digits-sd", split.recipe, tmp_path / "small")
    assert weight_bytes(made) == split.nbytes
    assert 0.9 * target < sum(split.nbytes.values()) <= target
    assert all(name in str(split) for name in ("unet", "text_encoder", "vae", "pipeline"))
    if target < 3_000_000:
        assert {*split.schemes} == {"text_encoder", "vae"}
        assert set(split.schemes.values()) != {"original"}
        plain = StableDiffusionPipeline.from_pretrained(made)
        for name, label in split.schemes.items():
            assert bool(packed_layers(getattr(plain, name))) == (label != "original")


def test_a_budget_that_nothing_meets_is_refused_with_the_least(searched, tmp_path) -> None:
    with pytest.raises(QuantDMError, match=r"expected \d+ or more"):
        select_pipeline(searched, target_bytes=1000)
    with pytest.raises(QuantDMError, match="by: got 'luck'"):
        select_pipeline(searched, target_bytes=10**7, by="luck")
    arguments = ["select", "--run-dir", str(searched.folder), "-o", str(tmp_path / "recipe.yaml")]
    both = CliRunner().invoke(app, [*arguments, "--target-pipeline-bytes", "4000000", "--target-bits", "3"])
    assert both.exit_code != 0
    assert not (tmp_path / "recipe.yaml").exists()


def test_the_parts_of_sdxl_are_counted_to_the_byte_and_opened_again(tmp_path) -> None:
    pipe = sdxl()
    pipe.save_pretrained(tmp_path / "sdxl")
    parts = other_parts(open_source(tmp_path / "sdxl"))
    assert {part.name for part in parts} == {"text_encoder", "text_encoder_2", "vae"}
    schemes = dict(zip((part.name for part in parts), PART_OPTIONS[1:], strict=False))
    rules = {part.name: part.rules(schemes[part.name]) for part in parts}
    components = {name: own.model_dump(include={"layers", "default", "embeddings"}) for name, own in rules.items()}
    made = export_pipeline(
        tmp_path / "sdxl", Recipe(model="sdxl", default="uniform-channel-4", components=components), tmp_path / "small"
    )
    found = weight_bytes(made)
    for part in parts:
        assert found[part.name] == part.bytes_under(rules[part.name])
        assert part.bytes_under(rules[part.name]) < part.bytes_under(None)
    again = DiffusionPipeline.from_pretrained(made)
    assert all(packed_layers(getattr(again, part.name)) for part in parts)
