"""How much measuring does the demo need? Fewer images per label, fewer trials, fewer images per one-layer error.

    PYTHONPATH=. python eval/demo_study.py RUN_DIR PART ...      # parts: labels, replay, errors, sweeps, verify, whole

RUN_DIR is a finished run of 160 trials of 300 images and 8 steps, verified on 300 images; samples and labels are
added to it.
`labels`: the trials nearest to the target, labelled by the first k images of one draw at the run's steps and at half of
them, held against fid_fp at the protocol's steps on other noises: rank correlation, and the spread of a label of k
images around that of all. `replay`: which configuration do the surrogates choose from all or part of the trials (of
random, frontier and learned ones equal shares), labelled as they were or anew at few steps, and how good is it really?
Three seeds, of surrogates, parts and the noises of new labels. `errors`: one-layer errors of fewer images and steps
against those of the run, over all options of some layers. `sweeps`: the same of weights refined in fewer rounds.
`verify`: how much worse is the candidate that fewer images of the verification would choose?
`whole`: the recipes of two whole runs on the draws of their verification, one of which measured less.
"""

import argparse
import datetime
import itertools
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from quantdm.activations.calibration import calibrate
from quantdm.activations.moments import JointMoments
from quantdm.allocation import select
from quantdm.allocation.candidates import BASELINE, mean_of_standardised
from quantdm.allocation.pruning import dominated
from quantdm.bank.weight_bank import WeightBank
from quantdm.errors import QuantDMError
from quantdm.files import read_json, write_json
from quantdm.machine import one_torch_thread, versions
from quantdm.metrics import frechet_distance
from quantdm.metrics.samples import Draw
from quantdm.runs.choose import verification_draws
from quantdm.runs.evaluator import Evaluator, Probe, job_of
from quantdm.runs.proposals import SURROGATES, bits_apart, weights_near
from quantdm.runs.run import Run
from quantdm.runs.stages import load_space
from quantdm.runs.store import TrialStore
from quantdm.runs.trials import FRONTIER_SHARE, RANDOM_SHARE, load_trials, own_trials
from quantdm.schemes import ORIGINAL
from quantdm.surrogates import SearchSpace, attribute
from quantdm.surrogates.ranking import spearman

OUT = Path(__file__).resolve().parent / "results" / "demo_study.json"
SEEDS = 3
LABELLED, IMAGES, STEPS = 32, (50, 100, 150, 200, 300), (8, 4)  # trials, images and steps of `labels`
TRUTH = 200  # images of the truth that labels are held against
PLANS = ((160, 0), (160, 100), (96, 100), (160, 50), (96, 0))  # trials and images per label of `replay`; 0: the run's
DRAWS, CHECKED = (7001, 7002), 300  # draws of `replay` and their images: of no stage of a run
PROBED, FEWER = 8, ((8, 8), (8, 4))  # layers of `errors` and `sweeps`, images and steps of `errors`
ROUNDS = (2,)  # of `sweeps`
VERIFIED, RESAMPLED = (100, 150, 200, 300), 4000  # images of a draw of `verify`, and how often they are drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("parts", nargs="+", choices=("labels", "replay", "errors", "sweeps", "verify", "whole"))
    parser.add_argument("--less", type=Path, help="for `whole`: a run of the same seed that measured less")
    given = parser.parse_args()
    run = Run.open(given.run_dir)
    study = Study(run, Evaluator(run, run.open_subject()), load_space(run), given.less and Run.open(given.less))
    with one_torch_thread():
        for part in given.parts:
            for found in getattr(study, part)():
                known = read_json(OUT) if OUT.is_file() else {"version": 1}
                about = {"machine": platform.machine(), "versions": versions(), "date": str(datetime.date.today())}
                write_json(OUT, {**known, "model": run.settings.model, part: found, **about})
                print(part, found, flush=True)


class Study:
    """A run, its pipeline and its space."""

    def __init__(self, run: Run, evaluator: Evaluator, space: SearchSpace, less: Run | None = None) -> None:
        self.run, self.evaluator, self.space, self.less = run, evaluator, space, less
        self.target = run.settings.target_bits
        self.choices, self.y = load_trials(run, space)
        keys = [trial["key"] for trial in own_trials(run, space)]
        order = {key: place for place, key in enumerate(read_json(run.path("trials.json"))["keys"])}
        planned = np.argsort([order[key] for key in keys])  # as they were planned: random, near a frontier, learned
        self.choices, self.y = self.choices[planned], self.y[planned]

    def labels(self) -> Iterator[dict[str, Any]]:
        """Compare labels of fewer images and steps with the truth."""
        near = np.argsort(bits_apart(self.space, self.choices, [self.target]), kind="stable")
        some = self.choices[np.sort(near[:LABELLED])]
        truth = np.array([self._fid(choice, Draw(7003, TRUTH, self.run.settings.protocol.steps)) for choice in some])
        found: dict[str, Any] = {"trials": len(some), "truth": f"{TRUTH} images, other noises, all steps"}
        for steps in STEPS:
            start = time.process_time()
            values = np.array([self._fids(choice, Draw(7000, IMAGES[-1], steps)) for choice in some])
            seconds = (time.process_time() - start) / len(some)
            logs = np.log(values)
            for place, count in enumerate(IMAGES):
                gap = logs[:, place] - logs[:, -1]
                found[f"{count} images, {steps} steps"] = {
                    "spearman_to_truth": round(spearman(values[:, place], truth), 4),
                    "sd_of_log_around_all": round(float(gap.std(ddof=1)), 4),
                    "cpu_seconds": round(seconds * count / IMAGES[-1], 2),
                }
            yield found

    def replay(self) -> Iterator[dict[str, Any]]:
        """Choose from all or part of the trials, labelled as in the run or anew, and measure what was chosen."""
        found: dict[str, Any] = read_json(OUT).get("replay", {}) if OUT.is_file() else {}
        for trials, images in PLANS:
            name = f"{trials} trials, " + (f"{images} images, {STEPS[-1]} steps" if images else "as they were")
            if name in found:
                continue
            rows = [self._chosen(trials, self._relabelled(images, seed), seed) for seed in range(SEEDS)]
            draws = [Draw(base, CHECKED, self.run.settings.protocol.steps) for base in DRAWS]
            means = np.array([[self._fid(choice, draw) for draw in draws] for choice in rows]).mean(axis=1)
            found[name] = {
                "fid_fp": [round(float(mean), 5) for mean in means],
                "mean": round(float(means.mean()), 5),
                "sd": round(float(means.std(ddof=1)), 5),
            }
            yield found

    def _relabelled(self, images: int, seed: int) -> np.ndarray:
        """Return the labels of all trials by so many images at few steps, of the seed's own noises; 0: the run's."""
        if not images:
            return self.y
        draw, path = (
            Draw(7100 + seed, max(count for _, count in PLANS), STEPS[-1]),
            self.run.path(f"relabelled{seed}.json"),
        )
        known = read_json(path) if path.is_file() else []
        for choice in self.choices[len(known) :]:
            known.append(self._fids(choice, draw))
            write_json(path, known)
        return -np.log([row[IMAGES.index(images)] for row in known])

    def errors(self) -> Iterator[dict[str, Any]]:
        """Compare one-layer errors of fewer images and steps with those of the run."""
        found, own = {}, self.run.settings
        for images, steps in FEWER:
            changed = {"noise_images": images, "noise_steps": steps}
            evaluator = Evaluator(self._changed(self.run.folder, changed), self.evaluator.subject)
            found[f"{images} images of {steps} steps for {own.noise_images} of {own.label_steps}"] = self._told(
                evaluator
            )
            yield found

    def sweeps(self) -> Iterator[dict[str, Any]]:
        """Compare one-layer errors of weights that were refined in fewer rounds with those of the run."""
        subject, settings = self.evaluator.subject, self.run.settings
        names = {part: [layer.name for layer in layers] for part, layers in subject.part_layers.items()}
        moments = calibrate(subject.pipe, settings.calibration, names, folder=self.run.path("moments"))
        layers, found = [subject.layers[place] for place in self.places], {}
        for sweeps in ROUNDS:
            with tempfile.TemporaryDirectory() as folder:
                start = time.process_time()
                bank = WeightBank(Path(folder), layers, settings.bank_schemes, sweeps=sweeps)
                bank.build(subject.weights, moments=JointMoments(moments), workers=1)
                seconds = time.process_time() - start
                evaluator = Evaluator(self.run, subject)
                evaluator.bank = bank
                found[f"{sweeps} of {settings.sweeps} sweeps"] = self._told(evaluator) | {
                    "bank_cpu_seconds": round(seconds, 1)
                }
            yield found

    @property
    def places(self) -> list[int]:
        """The layers that are probed, evenly over all."""
        return np.linspace(0, len(self.space.layers) - 1, PROBED).round().astype(int).tolist()

    def _changed(self, folder: Path, changed: dict[str, int]) -> Run:
        return Run(folder, self.run.settings.model_copy(update=changed))

    def _told(self, evaluator: Evaluator) -> dict[str, float]:
        """Return how an evaluator's one-layer errors relate to the run's."""
        columns = [place for place, option in enumerate(self.space.options) if option != ORIGINAL]
        labels = tuple(self.space.labels[place] for place in columns)
        whole = np.log(self.space.noise_error[np.ix_(self.places, columns)])
        evaluator.recorded_calls()
        start = time.process_time()
        rows = [evaluator.sensitivity(Probe(self.space.layer_names[place], labels)) for place in self.places]
        gap = np.log(np.array(rows)) - whole
        return {
            "spearman": round(spearman((whole + gap).ravel(), whole.ravel()), 4),
            "mean_of_log": round(float(gap.mean()), 4),
            "sd_of_log": round(float(gap.std()), 4),
            "sd_of_log_within_a_layer": round(float((gap - gap.mean(axis=1, keepdims=True)).std()), 4),
            "cpu_seconds_of_a_layer": round((time.process_time() - start) / PROBED, 2),
        }

    def whole(self) -> Iterator[dict[str, Any]]:
        """Hold the recipe of a run that measured less against the run's, on equal draws, before and after tuning."""
        found: dict[str, Any] = {}
        for name, run in (("run", self.run), ("less", self.less)):
            if run is None:
                raise QuantDMError("whole: give the run that measured less (--less RUN_DIR)")
            figures = read_json(run.path("tuning.json"))["figures"]
            own = ("label_images", "label_steps", "noise_images", "noise_steps", "sweeps", "verify_images")
            found[name] = {key: getattr(run.settings, key) for key in own} | {
                f"fid_fp_{state}": {kind: round(row[kind]["fid_fp"], 6) for kind in ("mean", "sd")}
                for state, row in figures.items()
            }
        yield found

    def verify(self) -> Iterator[dict[str, Any]]:
        """Tell what fewer images of the verification would cost, from the influence of every image that was measured.

        Resampled images of all draws disturb the distances as new noises would; regret is how far the candidate that
        is then the best is from the best of all that was measured.
        """
        store, found, chance = TrialStore(self.run.path("verified")), {}, np.random.default_rng(0)
        selection, draws = read_json(self.run.path("selection.json")), verification_draws(self.run)
        names = [n for n, row in selection["candidates"].items() if row["draws"] == len(draws) and BASELINE not in n]
        configs = [selection["configs"][name] for name in names]
        rows = [[store.get(job_of(self.run, draw, labels).key) or {} for draw in draws] for labels in configs]
        distances = np.array([[row["fid_fp"] for row in own] for own in rows])
        influences = np.array([[row["influence"] for row in own] for own in rows])  # candidates, draws, images
        means, images = distances.mean(axis=1), influences.shape[2]
        for count in VERIFIED:
            regrets = []
            for _ in range(RESAMPLED):
                picked = [influences[:, place][:, chance.integers(0, images, count)] for place in range(len(draws))]
                now = means + np.mean([values.mean(axis=1) for values in picked], axis=0)
                regrets.append(means[np.argmin(now)] - means.min())
            found[f"{len(draws)} x {count} images"] = {"mean_regret": round(float(np.mean(regrets)), 6)}
            yield {"candidates": len(names), "best": round(float(means.min()), 6), **found}

    def _chosen(self, trials: int, labels: np.ndarray, seed: int) -> np.ndarray:
        """Return the choice that the mean of the surrogates makes of part of the trials."""
        chance, total = np.random.default_rng(seed), len(self.y)
        anchors = np.arange(len(self.space.options) - (ORIGINAL in self.space.options))  # every option alone: first
        cuts = [len(anchors), round(RANDOM_SHARE * total), round((RANDOM_SHARE + FRONTIER_SHARE) * total), total]
        share = (trials - len(anchors)) / (total - len(anchors))
        kinds = [np.arange(a, b) for a, b in itertools.pairwise(cuts)]
        own = np.concatenate([anchors, *(chance.permutation(kind)[: round(share * len(kind))] for kind in kinds)])
        choices, y = self.choices[own], labels[own]
        weights = weights_near(self.space, choices, self.target)
        fitted = [kind(self.space, random_state=seed).fit(choices, y, weights) for kind in SURROGATES.values()]
        mixed = mean_of_standardised([attribute(surrogate).values for surrogate in fitted])
        return select(self.space, mixed, target_bits=self.target, forbidden=dominated(self.space))

    def _fid(self, choice: np.ndarray, draw: Draw) -> float:
        return float(self.evaluator.measure(job_of(self.run, draw, self.space.config(choice).to_labels()))["fid_fp"])

    def _fids(self, choice: np.ndarray, draw: Draw) -> list[float]:
        """Return the fid_fp of the first images of a draw, by their number."""
        reference = self.evaluator.reference(draw).features
        own = self.evaluator.samples(job_of(self.run, draw, self.space.config(choice).to_labels())).features
        return [frechet_distance(own[:count], reference[:count]) for count in IMAGES if count <= draw.images]


if __name__ == "__main__":
    main()
