"""Rows on equal seeds: images to folders, tables with intervals, the scripts; what batches and kills do not change."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from quantdm import ActivationSpec, load_pipeline, set_activation_bits_
from quantdm.cli.main import app
from quantdm.errors import QuantDMError
from quantdm.metrics.distance import frechet_of_gaussians
from quantdm.metrics.features import open_features
from quantdm.metrics.images import open_images
from quantdm.metrics.influence import frechet_influence
from quantdm.metrics.kernels import kid
from quantdm.metrics.manifest import MANIFEST
from quantdm.metrics.measure import measure
from quantdm.metrics.table import build_table
from quantdm.metrics.to_folder import generate_to_folder, share
from quantdm.pipelines.protocol import load_protocol

DIT = load_protocol("digits-dit")
SEEDS = range(3_000_000, 3_000_064)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Statistics of tests stay in a folder of theirs."""
    monkeypatch.setenv("QUANTDM_CACHE", str(tmp_path_factory.mktemp("cache")))


def run(*arguments, code=0):
    """Run a command in this process and return its output."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else str(result.exception)


def pixels(folder):
    return np.stack([np.asarray(Image.open(p)) for p in sorted(folder.glob("*.png"))]).astype(int)


# ------------------------------------------------------------------------------------------------ images to a folder


def test_equal_seeds_give_equal_images_in_batches_of_1_7_and_64(tmp_path, dit):
    for batch in (1, 7, 64):
        generate_to_folder(dit, DIT, SEEDS, tmp_path / str(batch), steps=2, batch_size=batch)
    one, seven, all_ = (pixels(tmp_path / str(batch)) for batch in (1, 7, 64))
    assert np.array_equal(one, seven)
    assert np.array_equal(one, all_)
    assert np.abs(one[0] - one[1]).max() > 50


def test_a_killed_run_goes_on_and_processes_share_the_work(tmp_path, dit):
    whole = tmp_path / "whole"
    assert generate_to_folder(dit, DIT, SEEDS[:10], whole, steps=1, batch_size=5) == 10
    for part in (0, 2, 1):
        generate_to_folder(dit, DIT, SEEDS[:10], tmp_path / "parts", steps=1, batch_size=5, shard=(part, 3))
    assert np.array_equal(pixels(whole), pixels(tmp_path / "parts"))
    for name in ("000002.png", "000003.png", "000008.png"):
        (whole / name).unlink()
    with pytest.raises(QuantDMError, match="holds 7 of the 10 images that its manifest names"):
        open_images(whole)
    assert generate_to_folder(dit, DIT, SEEDS[:10], whole, steps=1) == 3
    assert np.abs(pixels(whole) - pixels(tmp_path / "parts")).max() <= 1
    with pytest.raises(QuantDMError, match="holds images of another pipeline, protocol, number of steps or seeds"):
        generate_to_folder(dit, DIT, SEEDS[:10], whole, steps=2)
    rounded = load_pipeline("digits-dit")
    set_activation_bits_(rounded.transformer, ActivationSpec(bits=8))  # equal weights, other images
    with pytest.raises(QuantDMError, match="holds images of another pipeline"):
        generate_to_folder(rounded, DIT, SEEDS[:10], whole, steps=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear")
    with pytest.raises(QuantDMError, match=r"is not empty and has no manifest\.json"):
        generate_to_folder(dit, DIT, SEEDS[:10], tmp_path / "mine", steps=1)
    shares = [share(10, (i, 4)) for i in range(4)]
    assert [i for part in shares for i in part] == list(range(10))
    with pytest.raises(QuantDMError, match="shard: got 4/4"):
        share(10, (4, 4))


def test_images_know_their_steps_seeds_and_prompts(tmp_path, dit):
    generate_to_folder(dit, DIT, SEEDS[:12], tmp_path / "a", steps=1)
    images = open_images(tmp_path / "a")
    assert (images.steps, images.seeds) == (1, "3000000...3000011")
    assert images.prompts == (*map(str, range(10)), "0", "1")
    figure = measure(images, open_features("digits"), ["agreement"])[0]
    assert 0 <= figure.value <= 1
    assert "12 images, 1 steps, seeds 3000000...3000011" in figure.protocol


def test_latents_are_written_as_tensors(tmp_path, sd):
    from quantdm.files import load_tensors

    generate_to_folder(sd, load_protocol("digits-sd"), range(5, 7), tmp_path / "l", steps=1, latents=True)
    assert load_tensors(tmp_path / "l" / "000001.safetensors")[0]["latents"].shape == (4, 8, 8)


# --------------------------------------------------------------------------------------------------------- intervals


def test_influence_is_the_derivative_of_the_distance():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=g).double()
    y = torch.randn(80, 4, generator=g).double() * 1.5 + 0.3

    def distance(weight_x, weight_y):
        parts = []
        for z, w in ((x, weight_x), (y, weight_y)):
            w = w / w.sum()
            mean = w @ z
            parts += [mean, ((z - mean) * w[:, None]).T @ (z - mean)]
        return frechet_of_gaussians(*parts)

    own, other = frechet_influence(x, y)
    one, eps = (torch.ones(60).double(), torch.ones(80).double()), 1e-5
    for side, influence in ((0, own), (1, other)):
        for i in (0, 17, 41):
            moved = [w / w.sum() * (1 - eps) for w in one]
            moved[1 - side] = one[1 - side]
            moved[side][i] += eps
            assert (distance(*moved) - distance(*one)) / eps == pytest.approx(influence[i].item(), rel=1e-3, abs=1e-4)
    assert own.mean().abs() < 1e-12


def test_kid_of_pairs_is_zero_where_that_of_strangers_would_be_far_below():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert kid(x, x, paired=True)[0] == pytest.approx(0, abs=1e-12)
    assert kid(x, x)[0] < -0.05
    with pytest.raises(QuantDMError, match="got 50 and 49 images, expected as many"):
        kid(x, x[:49], paired=True)


# ------------------------------------------------------------------------------------------------------------- table


def test_a_table_has_every_row_on_equal_seeds_and_its_differences(tmp_path):
    out = tmp_path / "table"
    arguments = (
        "evaluate", "table", "digits-dit", "four=uniform-channel-4", "two=uniform-channel-2", "-o", out, "--images", 20,
        "--seeds", "1,2", "--steps", 2, "--features", "digits,pyramid",
    )  # fmt: skip
    text = run(*arguments)
    assert text.strip() == out.joinpath("table").with_suffix(".md").read_text().strip()
    record = json.loads((out / "table.json").read_text())
    rows = {row["row"]: row for row in record["rows"]}
    assert list(rows) == ["full precision", "four", "two"]
    for key in ("fd:digits", "fd:pyramid"):
        assert rows["two"]["mean"][key] > rows["four"]["mean"][key] > 0
        gap = record["differences"]["rows"]["two"][key]
        assert gap["images"]["low"] < rows["two"]["mean"][key] - rows["four"]["mean"][key] < gap["images"]["high"]
    psnr = record["differences"]["rows"]["two"]["psnr"]["images"]
    assert psnr["high"] < 0
    assert 0 < rows["full precision"]["mean"]["agreement"] <= 1
    assert record["manifest"]["sha256"] in text
    assert len(record["manifest"]["rows"]["four"]["weights"]) >= 2
    assert "seeds 1000000...1000019, 2000000...2000019" in record["protocol"]
    assert "biased upwards" in text
    with (out / "table.csv").open() as file:
        found = [(r["row"], r["draw"]) for r in csv.DictReader(file)]
    assert found[:3] == [("full precision", "0"), ("full precision", "1"), ("four", "0")]


def test_rows_of_other_draws_are_refused(tmp_path, dit):
    for name, count in (("a", 12), ("b", 10)):
        generate_to_folder(dit, DIT, SEEDS[:count], tmp_path / name, steps=1)
    a, b = (open_images(tmp_path / name) for name in ("a", "b"))
    with pytest.raises(QuantDMError, match="b: has other draws than a; expected the same seeds"):
        build_table("a", {"a": [a], "b": [b]}, [open_features("digits")])
    asked = ("evaluate", "table", "digits-dit", "-o", tmp_path / "t")
    assert "expected one of full precision, x" in run(*asked, "x=kmeans-channel-4", "--against", "y", code=1)
    assert "given twice" in run(*asked, "x=a", "x=b", code=1)


# ----------------------------------------------------------------------------------------------------------- commands


def test_fid_of_folders_pipelines_and_statistics(tmp_path, dit):
    generate_to_folder(dit, DIT, SEEDS[:12], tmp_path / "a", steps=1)
    generate_to_folder(dit, DIT, SEEDS[:12], tmp_path / "b", steps=2)
    stats = tmp_path / "b.safetensors"
    run("evaluate", "fid", "ref", tmp_path / "b", "-o", stats, "--features", "digits")
    calc = run("evaluate", "fid", "calc", tmp_path / "a", "--ref", stats)
    assert calc.startswith("FD-digits: ")
    assert "12 images against 12, 1 steps, seeds 3000000...3000011, 64 features, resize: none, 32 px" in calc
    both = ("evaluate", "fid", "compare", tmp_path / "a", tmp_path / "b")
    record = json.loads(run(*both, "--features", "digits", "--json"))
    assert [f["metric"] for f in record] == ["fd", "kid", "psnr", "ssim", "cosine"]
    assert f"FD-digits: {record[0]['value']:.3f}" in calc
    again = run("evaluate", "fid", "calc", "digits-dit", "--images", 12, "--seed", 3, "--steps", 2, "--ref", stats)
    assert float(again.split()[1]) < record[0]["value"]
    for arguments, message in {
        ("calc", str(tmp_path / "a"), "--ref", str(stats), "--features", "pyramid"): "are of FD-digits, .* of FD-pyr",
        ("compare", str(tmp_path / "a"), str(stats)): "holds statistics, expected images",
        ("calc", str(tmp_path / "a"), "--ref", str(tmp_path / "none")): "no such file or folder",
    }.items():
        with pytest.raises(QuantDMError, match=message):
            CliRunner().invoke(app, ["evaluate", "fid", *arguments], catch_exceptions=False)


def test_prompts_with_blank_lines_or_a_bom_count_only_what_they_say(tmp_path, dit):
    generate_to_folder(dit, DIT, SEEDS[:4], tmp_path / "a", steps=1)
    prompts = tmp_path / "p.txt"
    prompts.write_bytes("\ufeff0\n\n1\n2\n   \n3\n".encode())
    arguments = ["evaluate", "fid", "compare", str(tmp_path / "a"), str(tmp_path / "a"), "--prompts", str(prompts)]
    assert "agreement by digits" in run(*arguments, "--metrics", "agreement", "--features", "digits")
    prompts.write_bytes(b"0\n\n1\n2\n")
    with pytest.raises(QuantDMError, match="prompts: got 3, expected 4: one per image of"):
        CliRunner().invoke(app, [*arguments, "--metrics", "agreement", "--features", "digits"], catch_exceptions=False)
    prompts.write_bytes(b"\n  \n")
    with pytest.raises(QuantDMError, match=r"p.txt: is empty, expected one value per line"):
        CliRunner().invoke(app, [*arguments, "--metrics", "agreement", "--features", "digits"], catch_exceptions=False)
    prompts.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(QuantDMError, match=r"p.txt: is no text in UTF-8"):
        CliRunner().invoke(app, [*arguments, "--metrics", "agreement", "--features", "digits"], catch_exceptions=False)


def test_the_list_of_metrics_names_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    text = run("evaluate", "fid", "metrics")
    assert "missing; to get it: pip install hpsv2" in text
    assert "to get it: download alexnet-owt" in text
    assert "to get it: download pt_inception" in text


@pytest.mark.parametrize("script", ["fid", "generate", "evaluate"])
def test_scripts_say_how_they_are_used(script):
    text = (ROOT / "eval" / f"{script}.py").read_text()
    assert text.count(f"eval/{script}.py") >= 2
    assert len(text.splitlines()) < 25


def test_processes_of_a_launcher_make_one_folder(tmp_path, monkeypatch):
    """What `accelerate launch` does: RANK and WORLD_SIZE in the environment of each process."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        made = run("evaluate", "generate", "digits-dit", "-o", tmp_path / "a", "--images", 3, "--steps", 1)
        assert f"({1 + int(rank)} new)" in made
    assert len(open_images(tmp_path / "a")) == 3
    assert json.loads((tmp_path / "a" / MANIFEST).read_text())["images"] == 3
