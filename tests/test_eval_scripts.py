"""Scripts of eval/ that others run: the papers' protocols dry, the foreign network's names, the second ruler."""

import math
from pathlib import Path

import pytest
import torch

from quantdm.errors import QuantDMError
from quantdm.metrics.agreement import rank_agreement

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    """Scripts import what lies beside them."""
    monkeypatch.syspath_prepend(str(ROOT / "eval"))
    monkeypatch.setenv("QUANTDM_CACHE", str(tmp_path / "cache"))


def test_a_dry_run_takes_every_step_of_a_papers_protocol(scripts, tmp_path):
    """LDM-4, the one whose pipeline is our own; all six: python eval/reproduce_paper.py all --dry-run."""
    import reproduce_paper

    text = reproduce_paper.dry_run("ldm-4", tmp_path)
    rows = [line.split("|")[1].strip() for line in text.splitlines()]
    assert rows[2:] == ["full precision", "W4A16 uniform", "W4 A8"]
    assert "FD-pyramid to real images" in text


def test_expected_hours_follow_the_published_size(scripts, capsys):
    import reproduce_paper
    from paper_protocols import PAPERS

    assert reproduce_paper.flops_per_image(PAPERS["dit"]) == pytest.approx(4 * 119e9, rel=0.05)  # 119 GFLOP (DiT paper)
    reproduce_paper.announce("dit", 125.0)
    said = capsys.readouterr().out
    assert "expected: 13." in said
    assert "paper: 3.5 bits per weight" in said
    assert set(PAPERS) == {"pixart-alpha", "pixart-sigma", "hunyuan-dit", "sdxl", "dit", "ldm-4"}


def test_every_tensor_of_the_foreign_network_has_its_place(scripts):
    import foreign

    with torch.device("meta"):
        made = foreign.pipeline_of  # the configuration stands there
        names, attentions = foreign.plain_names(), foreign.attention_names()
    source = {f"{name}.{kind}": torch.zeros(1) for name in names for kind in ("weight", "bias")}
    for name in attentions:
        for part, shape in {"qkv": (6, 2, 1, 1), "proj_out": (2, 2, 1, 1), "norm": (2,)}.items():
            source |= {f"{name}.{part}.weight": torch.zeros(shape), f"{name}.{part}.bias": torch.zeros(shape[0])}
    label = {"0.weight": torch.ones(4, 1), "0.bias": torch.zeros(4), "2.weight": torch.eye(4), "2.bias": torch.ones(4)}
    source |= {f"label_emb.{name}": value for name, value in label.items()}
    found = foreign.renamed(source)
    with pytest.raises(RuntimeError) as stop:  # shapes are made up; names must be those of UNet2DModel
        made(source)
    assert "size mismatch" in str(stop.value)
    assert "Missing key" not in str(stop.value)
    assert "Unexpected key" not in str(stop.value)
    half = 1 / (1 + math.exp(-1.0))  # SiLU of 1
    assert found["class_embedding.weight"][-1].tolist() == pytest.approx([1 + half] * 4)
    with pytest.raises(SystemExit, match="which have no place"):
        foreign.renamed(source | {"more.weight": torch.zeros(1)})


def test_rank_agreement_of_rulers():
    found = rank_agreement(
        {"a": [1, 2, 3, 4], "b": [10, 20, 30, 40], "up": [4, 3, 2, 1], "x": [1, 2, 4, 3]}, higher=["up"]
    )
    assert found["a / b"]["spearman"] == found["a / up"]["kendall"] == pytest.approx(1)
    assert (found["a / x"]["differently"], found["a / x"]["pairs"]) == (1, 6)
    assert found["a / x"]["kendall"] == pytest.approx(4 / 6)
    assert rank_agreement({"a": [1, 1, 1], "b": [1, 2, 3]})["a / b"]["spearman"] is None
    with pytest.raises(QuantDMError, match="expected the same three or more"):
        rank_agreement({"a": [1, 2], "b": [1, 2]})


@pytest.mark.filterwarnings("ignore:integer residency")  # of convolutions, whose inputs stay as they are
def test_the_bench_of_packed_weights_on_a_gpu_runs_small_and_finds_equal_outputs(scripts):
    import bench_cuda

    notes, before = bench_cuda.Notes(None), bench_cuda.fused.wanted
    try:
        bench_cuda.bench(notes, bench_cuda.Place(torch.device("cpu"), tiny=True))
    finally:
        bench_cuda.fused.wanted = before
    assert len(notes.found) == len(bench_cuda.NAMES) * (len(bench_cuda.SCHEMES) + 1)
    for title, found in notes.found.items():
        assert found.get("output_sd", 1.0) > 0.01
        for way, row in found["rows"].items():
            assert row["plain"]["ms"] >= row["plain"]["best"] > 0, (title, way)
            assert row.get("difference", 0.0) == 0.0, (title, way)
    assert bench_cuda.record(notes.found)["models"] is notes.found
    lines = bench_cuda.table_of(notes.found).splitlines()
    assert sum(bench_cuda.INTEGER in line for line in lines) == len(bench_cuda.NAMES)
    assert sum("kernel was NOT used" in line for line in lines) == len(bench_cuda.NAMES) * len(bench_cuda.SCHEMES)
