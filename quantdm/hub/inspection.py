"""Everything that `quantdm inspect` knows of a pipeline, an export or a recipe, as a record."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from quantdm.denoisers.analysis import analyse
from quantdm.errors import QuantDMError
from quantdm.hub.quantize import model_layers, stored_bits
from quantdm.metrics import relative_error
from quantdm.modules import packed_layers
from quantdm.modules.blob import blob_size
from quantdm.pipelines.loading import EMBEDDED, known_pipelines, load_pipeline, pipeline_path
from quantdm.pipelines.parts import DENOISER_NAMES, find_denoisers
from quantdm.pipelines.skeleton import open_skeleton
from quantdm.quantizers import quantize_weight
from quantdm.recipe import Recipe, load_recipe
from quantdm.schemes import QuantConfig, Scheme


def inspect_target(
    target: str,
    *,
    model: str | None = None,
    scheme: str | None = None,
    recipe: Path | None = None,
    overrides: Sequence[str] = (),
    example_inputs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return one record per quantizable layer of a pipeline, an export, or the model of a recipe file.

    Args:
        target: an embedded pipeline, a directory, a hub id, or a recipe file (*.yaml).
        model: the model of a recipe file, where it is not the one that the recipe names.
        scheme: show the bits and SQNR of every layer under this scheme.
        recipe: or under the schemes of this recipe.
        overrides: `PATTERN=SCHEME` on top of the scheme or recipe.
        example_inputs: keyword arguments of one call of the denoiser, where they cannot be inferred.

    Returns:
        A JSON record. Layers of further parts of the pipeline are named `PART:layer`. SQNR is there where the original
        weights are: not for an export, and not for a hub id, of which only the configuration is fetched.

    Raises:
        QuantDMError: nothing there, a recipe that does not fit, or a scheme for what is quantized already.
    """
    is_recipe = Path(target).suffix in (".yaml", ".yml")
    if sum((is_recipe, scheme is not None, recipe is not None)) > 1:
        raise QuantDMError("inspect: give one of a recipe file, --scheme and --recipe")
    rules = load_recipe(target) if is_recipe else None if recipe is None else load_recipe(recipe)
    if scheme is not None:
        rules = Recipe(model=target, default=Scheme.parse(scheme).label)
    if overrides and rules is None:
        raise QuantDMError("inspect: --set changes a scheme or recipe; give --scheme, --recipe or a recipe file too")
    rules = None if rules is None else rules.override(overrides)
    if model is not None and not is_recipe:
        raise QuantDMError(f"inspect: --model goes with a recipe file, got {target!r}")
    where = model or (rules.model if is_recipe and rules is not None else target)
    parts = _open(where, rules)
    if example_inputs is not None:
        analyse(parts[""], example_inputs=example_inputs)  # from here on they are known
    rows = [row for name, part in parts.items() for row in _rows(name, part, rules, where)]
    weights = sum(row["num_weights"] for row in rows)
    bits = sum(row["num_bits"] for row in rows)
    return {
        "model": where,
        "denoiser": type(parts[""]).__name__,
        "layers": rows,
        "num_weights": weights,
        "avg_bits": bits / weights,
        "num_bits": bits,
        "weight_bytes": sum(row["nbytes"] for row in rows),
        "file_bytes": _file_bytes(where, parts),
        "provenance": rules.provenance.source if is_recipe and rules is not None else None,
    }


def _open(where: str, rules: Recipe | None) -> dict[str, nn.Module]:
    """Return the denoiser (named "") and the further parts that are or may be quantized."""
    local = os.path.isdir(where) or where in known_pipelines()
    if not local or not (Path(pipeline_path(where)) / "model_index.json").is_file():
        if rules is not None and rules.components:
            raise QuantDMError(f"inspect: the recipe has components, and {where} is no directory of a pipeline")
        return {"": open_skeleton(where)}
    pipe = load_pipeline(where)
    main, *others = find_denoisers(pipe).items()
    wanted = set(rules.components) if rules is not None else set()
    found = {"": main[1], **dict(others)}
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name not in (main[0], *found) and (name in wanted or packed_layers(part)):
            found[name] = part
    if wanted - set(found):
        raise QuantDMError(f"inspect: {where} has no component {min(wanted - set(found))!r} that the recipe names")
    return found


def _rows(part_name: str, part: nn.Module, rules: Recipe | None, where: str) -> list[dict[str, Any]]:
    layers, packed = model_layers(part), packed_layers(part)
    if packed and rules is not None:
        raise QuantDMError(f"inspect: {where} is quantized already; leave out schemes and recipes to see its layers")
    config = None
    if rules is not None:
        own = rules if not part_name else rules.component(part_name) if part_name in rules.components else None
        if own is None or (not own.has_rules and own.components):
            config = QuantConfig.uniform([layer.name for layer in layers], None)
        else:
            config = own.resolve(layers)
    rows = []
    # disable=None: no bar where nobody watches
    progress = tqdm(layers, desc="quantize", unit="layer", delay=2, leave=False, disable=None if config else True)
    for layer in progress:
        row: dict[str, Any] = {
            "name": f"{part_name}:{layer.name}" if part_name else layer.name,
            "op_type": layer.op_type,
            "block": getattr(layer, "block", ""),
            "shape": list(layer.shape),
            "num_weights": layer.num_weights,
            "quantizers": 1 if layer.split is None else 2,
        }
        scheme = packed[layer.name].scheme if layer.name in packed else config[layer.name] if config else None
        row["scheme"] = None if scheme is None else scheme.label
        bits = stored_bits(layer, scheme)
        row["num_bits"], row["bits"] = bits, round(bits / layer.num_weights, 4)
        row["nbytes"] = bits // 8 if scheme is None else blob_size(tuple(layer.shape), scheme, layer.split)
        if config is not None:
            row["sqnr_db"] = None if scheme is None else _sqnr_db(part, layer, scheme)
        rows.append(row)
    return rows


def _sqnr_db(part: nn.Module, layer: Any, scheme: Scheme) -> float | None:
    weight = part.get_parameter(f"{layer.name}.weight").detach()
    if weight.is_meta:
        return None
    quantized = quantize_weight(weight, scheme, split=layer.split, name=layer.name)
    error = relative_error(quantized.dequantize(dtype=torch.float32), weight)
    return None if error == 0 else round(-10 * math.log10(error), 2)


def _file_bytes(where: str, parts: dict[str, nn.Module]) -> int | None:
    """Return the size of the denoiser's (and the shown parts') weight files, where the pipeline lies on this disk."""
    folder = Path(where if os.path.isdir(where) else EMBEDDED / where)
    names = [next((n for n in DENOISER_NAMES if (folder / n).is_dir()), ""), *(name for name in parts if name)]
    sizes = [path.stat().st_size for name in names for path in (folder / name).glob("*.safetensors")]
    return sum(sizes) or None
