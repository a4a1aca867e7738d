"""quantdm beside its peers at equal bytes: images, seconds and bytes of an embedded pipeline.

    python eval/allocation_study.py digits-dit --run-dir runs/study-dit      # or any other finished run
    python eval/compare_peers.py digits-dit --run-dir runs/study-dit --peers .peers/bin/python -o runs/peers

The environment of the peers: see eval/bench_quantizers.py. Every peer quantizes at its own defaults, without data; for
each, quantdm gives two denoisers of no more bytes: the mix of data-free schemes with the least weight error, and the
recipe that the run's surrogates choose, verified and tuned, both with embedding tables at 8 bits (no peer here
quantizes them). Peers whose sizes differ by less than GROUP share what
quantdm made for the smallest of them. fid_fp and PSNR are to the full-precision images of the same noises; with
--rulers efficientnet-lite0 (extra `features`) also the distance by ImageNet features. What is measured is kept in the
folder; run it again to go on. Writes eval/results/peers_PIPELINE.json.
"""

import argparse
import datetime
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bench_models import OPTIONS, Case, Choices
from bench_quantizers import peer_versions
from judge import Judge
from step_times import step_times
from torch import nn

from quantdm import get_denoiser, list_tables
from quantdm.allocation import select
from quantdm.allocation.candidates import mean_of_standardised
from quantdm.allocation.pruning import dominated
from quantdm.files import digest, load_tensors, read_json, write_json
from quantdm.hub.size import ExportSize
from quantdm.machine import cores, versions
from quantdm.metrics.samples import Draw
from quantdm.metrics.statistics import mean_and_sd, spread
from quantdm.pipelines.known import known_pipelines
from quantdm.quantizers import quantize_weight
from quantdm.recipe import Recipe
from quantdm.runs.choose import verification_draws
from quantdm.runs.engines.local import Engine
from quantdm.runs.explain import load_attributions
from quantdm.runs.run import Run
from quantdm.runs.stages import load_space
from quantdm.runs.store import TrialStore
from quantdm.runs.tune import tune_run
from quantdm.runs.tuned import TunedWeights
from quantdm.runs.verify import verify
from quantdm.schemes import TABLE_SCHEME, Scheme
from quantdm.tuning import TuneSettings

OUT = Path(__file__).parent / "results"
IMAGES, STEPS, DRAWS = 500, 20, (121, 122, 123)
GROUP = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=known_pipelines())
    parser.add_argument("--run-dir", type=Path, required=True, help="a finished run with calibrated options")
    parser.add_argument("--peers", type=Path, required=True, help="the python of the peers' environment")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for what is measured")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--rulers", nargs="*", default=[], help="further features, e.g. efficientnet-lite0")
    parser.add_argument("--workers", type=int, default=None)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    case = Case(given.model, given.out)
    records = quantized_by_peers(given.peers, given.out, given.model)
    judge = Judge(given.model, [Draw(seed, given.images, STEPS) for seed in DRAWS], given.rulers)
    rows = Rows(judge, TrialStore(given.out / "rows"), given)
    found = [rows.measure("full precision", case.model.state_dict(), {})]
    for peer, record in records.items():
        weights = load_tensors(given.out / f"{given.model}.{peer}.safetensors")[0]
        told = {"bytes": record["bytes"], "seconds": round(record["cpu_s"], 2)}
        found.append(rows.measure(peer, weights, told | {"layers": record["quantized_layers"]}))
    sizes = grouped({peer: record["bytes"] for peer, record in records.items()})
    found += list(data_free(case, rows, sizes))
    found += list(searched(Run.open(given.run_dir), rows, sizes, given.workers))
    record = {"version": 1, "model": given.model, "rows": found, "peers": peer_versions(given.peers)}
    record["ms_per_step"] = step_times(given.model, rows.layouts, given.peers, given.out)
    record |= {"images": given.images, "steps": STEPS, "draws": DRAWS, "rulers": given.rulers, "within": sizes}
    record |= {"versions": versions(), "machine": f"{platform.machine()}, {cores()} cores"}
    write_json(OUT / f"peers_{given.model}.json", record | {"date": datetime.date.today().isoformat()})
    print(as_text(found, record["ms_per_step"]))


def quantized_by_peers(python: Path, folder: Path, model: str) -> dict[str, Any]:
    """Return what the peers say of their weights, which lie in the folder; a peer that cannot run here is left out."""
    path = folder / "records.json"
    if not path.is_file():
        script = str(Path(__file__).with_name("bench_peers.py"))
        subprocess.run([python, script, "models", folder, folder / model], check=True)
    records = read_json(path)[model]
    for peer, record in records.items():
        if "error" in record:
            print(f"{peer}: cannot run here: {record['error']}")
    return {peer: record for peer, record in records.items() if "error" not in record}


def grouped(sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the size that quantdm must not exceed for every peer: that of the smallest peer of similar size."""
    found, limit = {}, 0
    for peer in sorted(sizes, key=lambda p: sizes[p]):
        if not limit or sizes[peer] > limit * (1 + GROUP):
            limit = sizes[peer]
        found[peer] = limit
    return found


class Rows:
    """Measured rows, kept by what they are of."""

    def __init__(self, judge: Judge, store: TrialStore, given: argparse.Namespace) -> None:
        self.judge, self.store = judge, store
        self.layouts: dict[str, Mapping[str, str | None]] = {}
        self.settings = (given.model, given.images, tuple(given.rulers))

    def measure(self, name: str, weights: Mapping[str, torch.Tensor], told: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row: what is told of it, means and deviations of its figures."""
        key = digest(name, *self.settings, {k: v for k, v in told.items() if k != "seconds"})
        row = self.store.get(key)
        if row is None:
            with replaced(self.judge.denoiser, weights):
                figures = self.judge.figures()
            row = {"name": name, **told, **figures["mean"], **{f"{k}_sd": v for k, v in figures["sd"].items()}}
            self.store.put(key, row)
            print(f"{name}: fid_fp {spread(row['fid_fp'], row['fid_fp_sd'])}", flush=True)
        return row


@contextmanager
def replaced(denoiser: nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Give a denoiser other weights for a while."""
    kept, parameters = {}, dict(denoiser.named_parameters())
    try:
        for name in weights.keys() & parameters.keys():
            parameter = parameters[name]
            kept[name], parameter.data = parameter.data, weights[name].to(parameter.dtype)
        yield
    finally:
        for name, data in kept.items():
            parameters[name].data = data


def data_free(case: Case, rows: Rows, sizes: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """Measure the data-free mixes of least weight error."""
    choices, size = Choices(case), ExportSize(case.pipe, embeddings=TABLE_SCHEME)
    tables = decoded_tables(case.model)
    for limit in sorted(set(sizes.values())):
        budget = limit
        while True:  # the rest of the files, tables and header, is known when there is a choice
            choice = choices.best(budget)
            picked = [None if o == len(OPTIONS) else OPTIONS[o].label for o in choice]
            labels = dict(zip([layer.name for layer in case.layers], picked, strict=True))
            total = size.of(labels)
            if total <= limit:
                break
            budget -= total - limit
        weights = {f"{la.name}.weight": choices.decoded[i][choice[i]] for i, la in enumerate(case.layers)}
        told = {"bytes": total, "limit": limit, "seconds": round(choices.cpu_s, 1)}
        name = f"quantdm, data-free, {limit / 1e6:.2f} MB"
        rows.layouts[name] = labels
        yield rows.measure(name, weights | tables, told)


def decoded_tables(denoiser: nn.Module) -> dict[str, torch.Tensor]:
    """Return the embedding tables as every recipe of the search quantizes them."""
    weights = {
        f"{table.name}.weight": denoiser.get_parameter(f"{table.name}.weight") for table in list_tables(denoiser)
    }
    return {name: quantize_weight(weight.detach(), TABLE_SCHEME).dequantize() for name, weight in weights.items()}


def searched(run: Run, rows: Rows, sizes: Mapping[str, int], workers: int | None) -> Iterator[dict[str, Any]]:
    """Measure what the run's surrogates choose, tuned where that helps."""
    subject = run.open_subject()
    size, tables = ExportSize(subject.pipe, embeddings=TABLE_SCHEME), decoded_tables(get_denoiser(subject.pipe))
    with Engine(run, subject, workers=workers) as engine:
        for limit in sorted(set(sizes.values())):
            start = time.monotonic()
            labels, chosen = best_choice(run, engine, size, limit)
            folder = run.path(f"peers-{digest(labels)}")  # several sizes may choose the same
            folder.mkdir(exist_ok=True)
            recipe = Recipe(model=run.settings.model, layers=labels)
            path = tune_run(run, engine, recipe, TuneSettings(), images=128, folder=folder)
            told = {"bytes": size.of(labels), "limit": limit, "seconds": round(time.monotonic() - start)}
            told |= {
                "chosen": chosen,
                "tuned": path is not None,
                "labels": digest(labels),
                "tables": TABLE_SCHEME.label,
            }
            bank = engine.local.bank if path is None else TunedWeights.load(path)
            schemes = {name: Scheme.parse(label) for name, label in labels.items() if label is not None}
            weights = {f"{name}.weight": bank.get(name, scheme).dequantize() for name, scheme in schemes.items()}
            weights |= {} if path is None else TunedWeights.load(path).others
            name = f"quantdm, recipe, {limit / 1e6:.2f} MB"
            rows.layouts[name] = labels
            yield rows.measure(name, weights | tables, told)


def best_choice(run: Run, engine: Engine, size: ExportSize, limit: int) -> tuple[dict[str, str | None], str]:
    """Return the labels of the best candidate by verification whose files are no larger than `limit`, and its name."""
    space, attributions = load_space(run), load_attributions(run)
    values = {name: attribution.values for name, attribution in attributions.items()}
    values |= {"mean of surrogates": mean_of_standardised(list(values.values())), "sensitivity": -space.noise_error}
    largest = float(space.bits.max(axis=1).sum() / space.num_weights.sum())
    bits, barred = min(size.bits_within(space.options, limit), largest), dominated(space)
    picked = {name: select(space, table, target_bits=bits, forbidden=barred) for name, table in values.items()}
    configs = {name: space.config(choice).to_labels() for name, choice in picked.items()}
    figures = verify(run, engine, configs, verification_draws(run), f"verify within {limit / 1e6:.2f} MB")
    best = min(configs, key=lambda name: mean_and_sd(figures[name])["mean"]["fid_fp"] or 0.0)
    assert size.of(configs[best]) <= limit, (size.of(configs[best]), limit)
    return configs[best], best


def as_text(rows: Sequence[Mapping[str, Any]], times: Mapping[str, Any]) -> str:
    """Return the rows as a table, smallest first; milliseconds per step in dense and in packed layers."""
    lines = [f"{'':<30}{'MB':>6}{'fid_fp':>18}{'PSNR':>7}{'agreement':>11}{'ms':>8}{'packed':>8}"]
    for row in sorted(rows, key=lambda r: (r.get("bytes", 0), r["name"])):
        fid = spread(row["fid_fp"], row["fid_fp_sd"])
        psnr = "" if row.get("psnr_fp") is None else f"{row['psnr_fp']:.1f}"
        line = f"{row['name']:<30}{row.get('bytes', 0) / 1e6:>6.2f}{fid:>18}{psnr:>7}{row.get('agreement', 0):>11.3f}"
        own, peer = times.get(row["name"], {}), times["peers"].get(row["name"], {})
        cells = [own.get("dense"), own.get("packed", peer.get("ms"))]
        lines.append(line + "".join(f"{'' if ms is None else format(ms, '.1f'):>8}" for ms in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
