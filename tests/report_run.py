"""A finished run of a small real DiT with planted numbers, for the tests of the report."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import DiTTransformer2DModel

from quantdm.allocation import select
from quantdm.allocation.sampling import sample_configs
from quantdm.correction.record import Correction
from quantdm.denoisers.analysis import trace_graph
from quantdm.denoisers.inventory import list_layers
from quantdm.files import save_tensors, write_json
from quantdm.pipelines.protocol import load_protocol
from quantdm.pipelines.seen import Part, Seen
from quantdm.quantizers import count_bits
from quantdm.recipe import Provenance, Recipe
from quantdm.runs.evaluator import job_of
from quantdm.runs.run import Run, RunSettings
from quantdm.runs.split import SPLIT_FILE, SPLIT_VERSION, split_inputs
from quantdm.runs.store import TrialStore
from quantdm.runs.trials import label_draw
from quantdm.schemes import PAPER_OPTIONS
from quantdm.surrogates import LocalExplanation, SearchSpace
from quantdm.surrogates.attribution import summarise

SENSITIVE = "attn1.to_v"  # planted: this operation type suffers most


TUNING = (("untuned", 0.06), ("tuned", 0.05))


@cache
def make_space() -> SearchSpace:
    """Return the search space of a small real DiT: two blocks, planted one-layer noise errors."""
    denoiser = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, patch_size=2
    )
    layers, rng = list_layers(denoiser), np.random.default_rng(0)
    base = np.array([0.4 if layer.op_type == SENSITIVE else 0.02 for layer in layers]) * rng.lognormal(
        0, 0.2, len(layers)
    )
    noise = base[:, None] * np.array([4.0 ** (2 - option.bits) for option in PAPER_OPTIONS])
    noise *= rng.lognormal(0, 0.1, noise.shape)
    bits = np.array([[count_bits(layer.shape, o, layer.split) for o in PAPER_OPTIONS] for layer in layers])
    return SearchSpace(layers, trace_graph(denoiser), PAPER_OPTIONS, bits, 0.3 * noise, noise)


def row(name: str, fid: float, sd: float, bits: float = 3.0, note: str = "measured") -> dict:
    """One row of a result table."""
    return {
        "name": name,
        "note": note,
        "avg_bits": bits,
        "denoiser_bytes": round(bits * 1e5),
        "fid_fp": fid,
        "fid_fp_sd": sd,
        "fid_real": 0.2,
        "fid_real_sd": 0.01,
        "psnr_fp": None if name == "fp" else 20.0,
        "agreement": 0.99,
        "flagged": 0,
        "constant": 0,
        "seconds": 9.0,
        "draws": 2 if name in ("uniform-w4", "kmeans-w4") else 3,
    }


ROWS = [
    row("fp", 0.0, 0.0, bits=16.0),
    row("uniform-w4", 0.01, 0.001, bits=4.2),
    row("kmeans-w4", 0.008, 0.001, bits=4.4),
    row("uniform-next-width", 0.06, 0.003, bits=3.2, note="kmeans-channel-3"),
    row("least-weight-error", 0.07, 0.004),
    row("sensitivity-same-size", 0.03, 0.002),
    row("recipe", 0.02, 0.001),
    row("recipe+a6", 0.05, 0.004),
    row("recipe+a6+correction", 0.03, 0.002),
]


SEEN = Seen(
    pipeline="DiTPipeline",
    denoisers=("transformer",),
    parts={"transformer": Part(class_name="DiTTransformer2DModel", fingerprint="0123456789abcdef", dtype="float32")},
    device="cpu",
)


def make_run(folder: Path, space: SearchSpace, *, model: str = "digits-dit") -> Path:
    """Write every record of a finished run."""
    rng = np.random.default_rng(1)
    settings = RunSettings(
        model=model, location=model, seen=SEEN, options=space.labels, target_bits=3.2, trials=24, seed=0,
        protocol=load_protocol("digits-dit"), label_images=100, label_steps=6, verify_images=200, noise_images=4,
        dtype="float32", target_pipeline_bytes=4_000_000,
    )  # fmt: skip
    run = Run.create(folder, settings)
    rules = {"layers": {}, "default": "uniform-channel-8", "embeddings": None}
    vae = {"before": 700_000, "after": 360_000, "label": "uniform-channel-8", "rules": rules, "fid_fp": 0.0012}
    write_json(
        run.path(SPLIT_FILE),
        {
            "version": SPLIT_VERSION,
            "inputs": split_inputs(settings),
            "target_bytes": 4_000_000,
            "parts": {"vae": vae},
            "denoisers": {"before": 8_400_000, "at_most": 3_640_000},
            "target_bits": 3.2,
        },
    )
    space.save(run.path("space.json"))
    anchors = np.tile(np.arange(len(space.options))[:, None], (1, len(space.layers)))
    choices = np.concatenate([anchors, sample_configs(space, 15, seed=0)])
    fids = 0.1 * space.gather(space.noise_error, choices).sum(axis=1) * rng.lognormal(0, 0.1, len(choices))
    store = TrialStore(run.path("trials"))
    for choice, fid in zip(choices, fids, strict=True):
        labels, bits = space.config(choice).to_labels(), float(space.avg_bits(choice)[0])
        key = job_of(run, label_draw(run), labels).key
        store.put(key, {"config": labels, "avg_bits": bits, "fid_fp": float(fid)})
    folds = {name: rng.uniform(0.8, 0.95, 5).tolist() for name in ("additive", "tree", "graph")}
    null = {"average bits": 0.7, "sum of noise errors": 0.8, "sum of weight errors": 0.75}
    write_json(
        run.path("surrogate.json"), {"version": 1, "trials": 24, "held_out_spearman": folds, "without_learning": null}
    )
    found = {
        name: summarise(name, space, -space.noise_error * rng.lognormal(0, 0.1), space.noise_error) for name in folds
    }
    write_json(run.path("attribution.json"), {"version": 1, "attributions": {n: a.to_dict() for n, a in found.items()}})
    picks = {name: select(space, a.values, target_bits=3.2) for name, a in found.items()}
    picks["baseline: kmeans-channel-3"] = anchors[space.labels.index("kmeans-channel-3")]
    candidates = {
        name: {"avg_bits": float(space.avg_bits(c)[0]), "fid_fp_mean": 0.02, "fid_fp_sd": 0.001, "psnr_fp_mean": 20.0}
        for name, c in picks.items()
    }
    configs = {name: space.config(c).to_labels() for name, c in picks.items()}
    write_json(
        run.path("selection.json"), {"version": 1, "chosen": "tree", "candidates": candidates, "configs": configs}
    )
    chosen, rival = (picks[name] for name in ("tree", "baseline: kmeans-channel-3"))
    explanations = {}
    for name, a in found.items():
        base, predicted = a.total(np.stack([rival, chosen])).tolist()
        share = a.values[np.arange(len(chosen)), chosen] - a.values[np.arange(len(chosen)), rival]
        one = LocalExplanation(name, space, chosen, rival, base, predicted, share, np.abs(share) / 10)
        explanations[name] = one.to_dict()
    write_json(
        run.path("why.json"),
        {"version": 1, "chosen": "tree", "against": "baseline: kmeans-channel-3", "measured": [0.3, 0.4],
         "explanations": explanations},
    )  # fmt: skip
    names = [node.name for node in space.graph.nodes]
    edges = [
        {"source": names[a], "target": names[b], "drawn": [[a, b]], "undoes": 1 / (1 + index)}
        for index, (a, b) in enumerate(space.graph.edges)
    ]
    write_json(
        run.path("paths.json"),
        {"version": 1, "configuration": "the recipe", "labels": configs["tree"], "calls": 2, "images": 4, "share": 0.8,
         "edges": edges, "carrying": [0, 1, 3], "undone": 0.9, "missing": 0.05},
    )  # fmt: skip
    provenance = Provenance(source="measured: tree", seed=0, trials=24)
    Recipe(model=model, layers=configs["tree"], avg_bits=candidates["tree"]["avg_bits"], provenance=provenance).save(
        run.path("recipe.yaml")
    )
    protocol = {"images": 200, "draws": [101, 102, 103], "steps": 20, "guidance_scale": 1.5, "features": "digits",
                "scheduler": "the pipeline's own", "fid": "Frechet distance, float64", "dtype": "float32"}  # fmt: skip
    figures = {name: {"mean": {"fid_fp": d, "psnr_fp": 20.0}, "sd": {"fid_fp": 0.004}} for name, d in TUNING}
    write_json(
        run.path("tuning.json"),
        {
            "version": 1,
            "inputs": "planted",
            "settings": {"steps": 40, "rows": 8, "rate": 0.02, "every": 20, "seed": 0, "images": 16},
            "curve": {"transformer": [[0, 0.08], [20, 0.03], [40, 0.02]]},
            "figures": figures,
            "used": True,
            "seconds": 12.0,
        },
    )
    write_json(
        run.path("summary.json"),
        {"version": 1, "model": model, "versions": {"torch": "2.13.0"}, "protocol": protocol, "fid_floor": 0.04,
         "fp_noise": {"mean": 0.02, "sd": 0.001}, "rows": ROWS},
    )  # fmt: skip
    names = ("fp", "uniform-next-width", "recipe")
    generator = torch.Generator().manual_seed(0)
    images = {n: torch.randint(0, 256, (20, 3, 8, 8), generator=generator, dtype=torch.uint8) for n in names}
    save_tensors(run.path("samples.safetensors"), images)
    steps = np.arange(951, 0, -190)
    level = np.linspace(-5, 5, len(steps))
    Correction(
        log_snr=level, k=0.1 * np.exp(-(level**2)), bias=np.zeros((len(steps), 4)),
        shift=np.zeros((len(steps), 4)), q=0.1 + 0 * level, variant="k", model=model,
        diagnostics={"r2": 0.2 + 0 * level, "lag1": 0.1 + 0 * level}, measured={"none": [0.5, 0.6], "k": [0.3, 0.4]},
    ).save(run.path("correction.safetensors"))  # fmt: skip
    return folder
