"""A recipe within a budget of bit operations: weights and inputs chosen together from their one-layer errors."""

import numpy as np

from quantdm.allocation.pairs import select_pairs
from quantdm.denoisers.macs import layer_macs
from quantdm.errors import QuantDMError
from quantdm.files import read_json, write_json
from quantdm.machine import versions
from quantdm.progress import bar
from quantdm.recipe import (
    ActivationScheme,
    ActivationSpec,
    Provenance,
    Recipe,
    bit_operations,
    factor_bits,
    joint_rules,
)
from quantdm.runs.evaluator import Evaluator
from quantdm.runs.labels import calibration_of
from quantdm.runs.run import Run
from quantdm.runs.stages import RECORD_VERSION, load_space

INPUTS = ("token-4", "token-6", "token-8")
INPUTS_FILE = "input_sensitivity.json"


def select_within(
    run: Run, *, target_bops: float, target_bits: float | None = None, inputs: tuple[str, ...] = INPUTS
) -> Recipe:
    """Choose schemes of weights and of inputs for every layer; the recipe is predicted, not measured, and says so.

    The first call measures the error of the denoiser's output when only one layer's input is rounded; that is kept in
    the run.

    Args:
        run: with its search space, that is, past the sensitivities.
        target_bops: largest sum of MACs x weight bits x activation bits in one call with one sample.
        target_bits: largest average bits per weight as well (None: they follow from the operations).
        inputs: activation schemes to choose from.

    Raises:
        QuantDMError: several denoisers, no search space yet, or budgets that no choice meets.
    """
    space, subject = load_space(run), run.open_subject()
    if len(subject.part_names) > 1:
        raise QuantDMError(
            f"target_bops: the pipeline has {len(subject.part_names)} denoisers, whose activations a recipe gives one "
            "rule; expected one denoiser"
        )
    schemes = [ActivationScheme.parse(label) for label in inputs]
    errors = _input_errors(run, Evaluator(run, subject), space.layer_names, inputs)
    macs = layer_macs(subject.denoiser)
    per_layer = np.array([macs[name] for name in space.layer_names], dtype=np.int64)
    bits = np.array([[factor_bits(w) * factor_bits(a) for a in schemes] for w in space.options], dtype=np.int64)
    weights, picked = select_pairs(
        -space.noise_error,
        -errors,
        per_layer[:, None, None] * bits,
        int(target_bops),
        sizes=space.bits,
        max_bits=None if target_bits is None else int(target_bits * space.num_weights.sum()),
    )
    config, labels = space.config(weights), space.config(weights).to_labels()
    chosen = {name: inputs[i] for name, i in zip(space.layer_names, picked, strict=True)}
    bops = bit_operations(macs, config, {name: ActivationScheme.parse(label) for name, label in chosen.items()})
    return Recipe(
        model=run.settings.model,
        **joint_rules(labels, run.settings.seen.denoisers, embeddings=run.settings.embeddings),
        activations=ActivationSpec(layers=dict(chosen)),
        calibration=calibration_of(run.settings, labels),
        avg_bits=round(float(space.avg_bits(weights)[0]), 6),
        provenance=Provenance(
            source="predicted from one-layer errors of weights and inputs, not measured",
            quantdm=versions().get("quantdm"),
            seed=run.settings.seed,
            target=_told(target_bops, target_bits),
            weights=run.settings.seen.weights,
            notes=(f"{bops:g} bit operations in a call with one sample",),
        ),
    )


def _told(target_bops: float, target_bits: float | None) -> str:
    size = "" if target_bits is None else f", {target_bits:g} bits per weight"
    return f"{target_bops:g} bit operations a call{size}"


def _input_errors(run: Run, evaluator: Evaluator, names: tuple[str, ...], inputs: tuple[str, ...]) -> np.ndarray:
    """Return the one-layer errors of every layer's input under every scheme, [L, A]; what was measured is kept."""
    path, errors = run.path(INPUTS_FILE), {}
    if path.is_file():
        record = read_json(path, version=RECORD_VERSION)
        errors = record["errors"] if record["inputs"] == list(inputs) else {}
    with bar(len(names), "input sensitivity: one layer a time") as progress:
        for name in names:
            if name not in errors:
                errors[name] = evaluator.input_sensitivity(name, inputs)
                write_json(path, {"version": RECORD_VERSION, "inputs": list(inputs), "errors": errors})
            progress.update()
    return np.array([errors[name] for name in names])
