"""Why is 4-bit k-means not within noise of full precision on digits-sd? Keep single layers out and measure.

python eval/keep_ends.py runs/digits-sd-3bit      # a finished demo run; writes eval/results/keep_ends_MODEL.json
"""

import argparse
import datetime
from pathlib import Path

from quantdm.files import write_json
from quantdm.machine import versions
from quantdm.metrics.statistics import mean_and_sd
from quantdm.runs.evaluator import Evaluator, Job
from quantdm.runs.final import final_draws
from quantdm.runs.run import Run
from quantdm.surrogates import SearchSpace

OUT = Path(__file__).parent / "results"
SCHEME = "kmeans-channel-4"
LAYERS_KEPT = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run = Run.open(parser.parse_args().run)
    space = SearchSpace.load(run.path("space.json"))
    column = space.labels.index(SCHEME)
    order = space.noise_error[:, column].argsort()[::-1]
    evaluator, draws, rows = Evaluator(run, run.open_subject()), final_draws(run, images=1000), []
    for kept in range(LAYERS_KEPT + 1):
        names = [space.layer_names[i] for i in order[:kept]]
        labels: dict[str, str | None] = {name: None if name in names else SCHEME for name in space.layer_names}
        figures = mean_and_sd([evaluator.measure(Job(draw, labels)) for draw in draws])
        row = {
            "kept_in_16_bits": names,
            "share_of_one_layer_errors_left": float(
                space.noise_error[order[kept:], column].sum() / space.noise_error[:, column].sum()
            ),
            **{key: figures["mean"][key] for key in ("fid_fp", "psnr_fp", "fid_real")},
            **{f"{key}_sd": figures["sd"][key] for key in ("fid_fp", "fid_real")},
        }
        rows.append(row)
        print(row, flush=True)
    record = {"model": run.settings.model, "scheme": SCHEME, "images": 1000, "draws": [d.base_seed for d in draws]}
    record |= {"rows": rows, "versions": versions(), "date": datetime.date.today().isoformat()}
    write_json(OUT / f"keep_ends_{run.settings.model}.json", record)


if __name__ == "__main__":
    main()
