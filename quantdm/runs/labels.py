"""A recipe as it is measured: one scheme for every layer of the denoisers."""

from collections.abc import Iterable, Mapping

from quantdm.denoisers.tables import TableRecord
from quantdm.files import read_json
from quantdm.quantizers import count_bits
from quantdm.recipe import CalibrationSpec, Layer, Recipe, joint_config
from quantdm.runs.run import Run, RunSettings
from quantdm.runs.split import parts_of
from quantdm.schemes import ORIGINAL_BITS, Scheme
from quantdm.surrogates import SearchSpace


def labels_of(run: Run, recipe: Recipe, layers: Iterable[Layer]) -> dict[str, str | None]:
    """Return what `weights_of` does, of a recipe that a run can measure.

    Raises:
        QuantDMError: it also quantizes further parts of the pipeline, otherwise than its split does; as `weights_of`.
    """
    parts_of(run, recipe)
    return weights_of(run, recipe, layers)


def weights_of(run: Run, recipe: Recipe, layers: Iterable[Layer]) -> dict[str, str | None]:
    """Return layer name -> label of a recipe, its patterns, types and default resolved (None: stays as it is).

    Args:
        run: whose recipe it is.
        recipe: its rules for embedding tables are checked, and left to `tables_of`.
        layers: Linear and Conv layers of all denoisers, under joint names.

    Raises:
        QuantDMError: the recipe does not fit the layers and tables.
    """
    layers = list(layers)
    found = _joint(run, recipe, layers)
    return {layer.name: found[layer.name] for layer in layers}


def tables_of(run: Run, recipe: Recipe, layers: Iterable[Layer]) -> str | dict[str, str] | None:
    """Return what the embedding tables of a run take under a recipe, as a `Job` has it.

    One label where every table has that of the run (None: they stay as they are); else table -> label.
    """
    found = _joint(run, recipe, layers)
    names, usual = [table.name for table in _tables(run)], run.settings.embeddings
    own = {name: label for name in names if (label := found.get(name)) is not None}
    return usual if own == ({} if usual is None else dict.fromkeys(names, usual)) else own


def _joint(run: Run, recipe: Recipe, layers: Iterable[Layer]) -> dict[str, str | None]:
    return joint_config(recipe, [*layers, *_tables(run)], run.settings.seen.denoisers).to_labels()


def _tables(run: Run) -> list[TableRecord]:
    """Return the embedding tables of a run's denoisers; runs before 0.4 do not know them until they go on."""
    path = run.path("layers.json")
    records = read_json(path).get("tables", ()) if path.is_file() else ()
    return [TableRecord(**{**record, "shape": tuple(record["shape"])}) for record in records]


def calibration_of(settings: RunSettings, labels: Mapping[str, str | None]) -> CalibrationSpec | None:
    """Return what a configuration of a run was calibrated on; None where no scheme of it is calibrated."""
    schemes = {Scheme.parse(label) for label in labels.values() if label is not None}
    return settings.calibration if any(scheme.calibration is not None for scheme in schemes) else None


def label_bits(space: SearchSpace, labels: Mapping[str, str | None]) -> int:
    """Return the exact bits of a configuration's quantizable weights, of which its schemes need not be options."""
    bits = 0
    for layer in space.layers:
        label = labels[layer.name]
        if label is None:
            bits += layer.num_weights * ORIGINAL_BITS
        else:
            bits += count_bits(layer.shape, Scheme.parse(label), layer.split)
    return bits
