"""Configurations and trials that were published for the reference implementation, as recipes and trial records.

A configuration maps "model.<module path>.weight_quantizer" to "<method>-<bits>"; the second half of a split weight is
"..._0". Module paths are those of diffusers 0.29, or of the LDM code base for Stable Diffusion 1.5. See
docs/method.md, Published configurations.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantdm.denoisers.inventory import LayerRecord
from quantdm.errors import QuantDMError, nearest
from quantdm.files import digest
from quantdm.hub.importer.ldm import ldm_names
from quantdm.hub.importer.plain_pickle import read_plain_pickle
from quantdm.hub.quantize import average_bits
from quantdm.recipe import Provenance, Recipe
from quantdm.schemes import MAX_BITS, MIN_BITS, QuantConfig, Scheme

SOURCE = "imported from a published configuration, not measured here"
# Their codebooks have 16-bit entries.
METHODS = {"mse": "uniform-channel-{}", "kmeans": "kmeans-channel-{}-fp16", "kmeans_all": "kmeans-tensor-{}"}
FIGURES = {
    "FID-GT-1k": "fid_gt_1k",
    "avg_bits": "avg_bits",
    "quantized_size": "size",
    "quantized_error": "error",
    "bops": "bops",
}

_KEY = re.compile(r"(?:model\.)?(?P<path>.+?)(?:\.weight_quantizer(?P<half>_0)?)?")
_OPTION = re.compile(r"(?P<method>[a-z_]+)-(?P<bits>\d+)")


def import_recipe(path: str | Path, layers: Sequence[LayerRecord], *, model: str) -> Recipe:
    """Read a published configuration as an exact recipe.

    Args:
        path: the pickle file; see `read_plain_pickle` for what is refused.
        layers: those of the denoiser it is for.
        model: the model's name, for the recipe.

    Returns:
        A recipe whose provenance says what had to be decided: halves of a split weight with two options take the wider
        one, and operation types that the file never names stay in their original precision.

    Raises:
        QuantDMError: not such a file, unknown options, layers that the model has not, or single layers left out.
    """
    record = read_plain_pickle(path)
    if not isinstance(record, dict):
        hint = "; a list holds trials: give a directory as output" if isinstance(record, list) else ""
        raise QuantDMError(f"{path}: got a {type(record).__name__}, expected a dict layer -> option{hint}")
    config, notes = convert_config(record, layers, what=str(path))
    provenance = Provenance(source=SOURCE, reference=Path(path).name, notes=tuple(notes))
    bits = round(average_bits(layers, config), 6)
    return Recipe(model=model, layers=config.to_labels(), avg_bits=bits, provenance=provenance)


def import_trials(path: str | Path, layers: Sequence[LayerRecord]) -> list[tuple[str, dict[str, Any]]]:
    """Read published trials (`quant_cache.pkl`) as (key, record) pairs for a trial store.

    A record has the config, its average bits as quantdm counts them, the published FID to real images of 1,000 images
    (`fid_gt_1k`) and the other published figures under `published`.

    Raises:
        QuantDMError: as `import_recipe`; the message names the trial.
    """
    trials = read_plain_pickle(path)
    if not isinstance(trials, list):
        raise QuantDMError(f"{path}: got a {type(trials).__name__}, expected a list of trials")
    found: dict[str, dict[str, Any]] = {}
    for index, trial in enumerate(trials):
        what = f"{path}, trial {index}"
        options = trial.get("config") if isinstance(trial, dict) else None
        if not isinstance(options, dict):
            raise QuantDMError(f"{what}: has no 'config', expected a dict layer -> [option, bytes, bytes, error]")
        plain = {key: value[0] if isinstance(value, list) and value else value for key, value in options.items()}
        config, notes = convert_config(plain, layers, what=what)
        figures = {ours: _figure(trial[theirs], what, theirs) for theirs, ours in FIGURES.items() if theirs in trial}
        if "fid_gt_1k" not in figures:
            raise QuantDMError(f"{what}: has no 'FID-GT-1k'; its keys are {', '.join(map(str, trial))[:200]}")
        record = {
            "config": config.to_labels(),
            "avg_bits": average_bits(layers, config),
            "fid_gt_1k": figures.pop("fid_gt_1k"),
            "published": figures,
            "source": f"imported from {Path(path).name}",
            "notes": notes,
        }
        found[digest("reference", record)] = record
    return list(found.items())


def convert_config(
    options: Mapping[Any, Any], layers: Sequence[LayerRecord], *, what: str
) -> tuple[QuantConfig, list[str]]:
    """Return the config that published options mean for a denoiser, and notes on what had to be decided.

    Raises:
        QuantDMError: see `import_recipe`.
    """
    names = {layer.name: layer for layer in layers}
    aliases = dict(ldm_names(list(names)))
    halves: dict[str, dict[bool, Scheme]] = {}
    for key, option in options.items():
        match = _KEY.fullmatch(key) if isinstance(key, str) else None
        if match is None:
            raise QuantDMError(f"{what}: got the key {key!r:.80}, expected 'model.<layer>.weight_quantizer'")
        name = aliases.get(match["path"], match["path"])
        if name not in names:
            raise QuantDMError(f"{what}: the model has no layer {match['path']}; {nearest(name, names)}")
        second = match["half"] is not None
        if second and names[name].split is None:
            raise QuantDMError(f"{what}: {key} is a second half, but {name} reads no concatenated long skip")
        halves.setdefault(name, {})[second] = _scheme(option, f"{what}: {key}")
    schemes, two = {}, []
    for name, given in halves.items():
        found = [given[half] for half in (False, True) if half in given]
        schemes[name] = max(found, key=lambda scheme: scheme.bits)  # the first of equals: the main path
        if len(set(found)) > 1:
            two.append(name)
    notes = [f"{len(two)} split layers had two options, the wider one holds for both halves: {', '.join(two)}"] * bool(
        two
    )
    absent = [layer for layer in layers if layer.name not in schemes]
    partial = [layer.name for layer in absent if any(names[n].op_type == layer.op_type for n in schemes)]
    if partial:
        raise QuantDMError(
            f"{what}: leaves out {len(partial)} layers of types that it names, first {', '.join(partial[:3])}; it is "
            "for another model, or incomplete"
        )
    if absent:
        types = ", ".join(dict.fromkeys(layer.op_type for layer in absent))
        notes.append(f"{len(absent)} layers are not in the file and stay in their original precision: {types}")
    return QuantConfig({layer.name: schemes.get(layer.name) for layer in layers}), notes


def _scheme(option: Any, where: str) -> Scheme:
    match = _OPTION.fullmatch(option) if isinstance(option, str) else None
    if match is None or match["method"] not in METHODS or not MIN_BITS <= int(match["bits"]) <= MAX_BITS:
        raise QuantDMError(
            f"{where}: got the option {option!r:.60}, expected {', '.join(METHODS)} and bits, e.g. mse-4"
        )
    return Scheme.parse(METHODS[match["method"]].format(match["bits"]))


def _figure(value: Any, what: str, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise QuantDMError(f"{what}: {key} is {value!r:.60}, expected a finite number")
    return float(value)
