"""The model card of an export: what it is, what was measured, how to load it, its recipe, and what it cannot do."""

from pathlib import Path
from typing import Any

import yaml

from quantdm.errors import QuantDMError, counted
from quantdm.files import MARKUP_COMMENT, check_output, check_replaceable, read_json, write_text
from quantdm.hub.card_snippet import signature_of, snippet, task_of
from quantdm.hub.card_source import head_of_source
from quantdm.hub.export import configuration_digest
from quantdm.hub.header import read_headers
from quantdm.hub.inspection import left_in
from quantdm.hub.replace import CARD, CORRECTION_FILE, INDEX, RECIPE_FILE
from quantdm.metrics.statistics import spread
from quantdm.pipelines.parts import DENOISER_NAMES
from quantdm.recipe import Recipe, load_recipe
from quantdm.recipe.joint import joint_prefix

SUMMARY_VERSION = 1
FOLD_LINES = 40  # a longer recipe is folded

LIMITS = """\
- Import quantdm before loading: without it diffusers refuses the checkpoint, and transformers would not understand a
  quantized text encoder.
- Fewer weight bits make the model smaller, not faster: layers decode their weights when they run.
- Quantized weights cannot be trained; a LoRA works beside them (`quantdm.fuse_lora`).
- The licence and the terms of use of the original model hold for this one too, and so do its own limits and biases."""


def write_card(folder: str | Path, *, summary: str | Path | None = None, source: str | Path | None = None) -> Path:
    """Write the model card of an export: with it the directory is ready for the Hub.

    Args:
        folder: a directory that `export_pipeline` wrote.
        summary: summary.json of the run that measured the recipe; without it the card says that nothing was measured.
        source: where the quantized model lies, for its licence and base model (None: what the recipe calls it).

    Returns:
        The card's path, README.md in the directory.

    Raises:
        QuantDMError: the directory is no export, the summary is of another model or measured another recipe, or there
            is a README.md that quantdm did not write.
    """
    folder = Path(folder)
    for file in (INDEX, RECIPE_FILE):
        if not (folder / file).is_file():
            raise QuantDMError(
                f"model card: {folder} has no {file}; expected a directory of `quantdm export` or `apply`"
            )
    check_replaceable(check_output(folder / CARD))
    recipe = load_recipe(folder / RECIPE_FILE)
    measured = None if summary is None else read_json(summary, version=SUMMARY_VERSION)
    if measured is not None and measured.get("model") != recipe.model:
        raise QuantDMError(
            f"model card: {summary} was measured on {measured.get('model')}, expected {recipe.model}; name its own run"
        )
    if measured is not None:
        _check_measured(folder, recipe, str(summary), measured)
    text = card_text(folder, recipe, measured, recipe.model if source is None else source)
    write_text(folder / CARD, text, MARKUP_COMMENT)
    return folder / CARD


def _check_measured(folder: Path, recipe: Recipe, where: str, summary: dict[str, Any]) -> None:
    """Check that a row of a summary measured just this export: its packed weights, activations, correction, tuning."""
    part = _denoiser_of(folder)
    config = read_json(folder / part / "config.json").get("quantization_config", {})
    labels = {}
    for number, name in enumerate((part, *recipe.components)):  # a run measures all denoisers as one
        header, _ = read_headers(sorted((folder / name).glob("*.safetensors")))
        labels |= {joint_prefix(name, number) + layer: entry.scheme.label for layer, entry in header.table.items()}
    correction = folder / CORRECTION_FILE
    fitted = correction if correction.is_file() else None
    own = configuration_digest(labels, config.get("activations"), fitted, recipe.provenance.tuning)
    measured = [row["configuration"] for row in summary["rows"] if row.get("configuration") is not None]
    if not measured:
        raise QuantDMError(
            f"model card: {where} does not say which recipes it measured (it is of an older quantdm); run "
            "`quantdm run` of that run again, or leave it out"
        )
    if own not in measured:
        raise QuantDMError(
            f"model card: {where} measured other recipes, activations or corrections than those of {folder}; name the "
            "summary of the run that this export comes from, run `quantdm run` of it again, or leave it out"
        )


def _denoiser_of(folder: Path) -> str:
    return next((name for name in DENOISER_NAMES if (folder / name / "config.json").is_file()), "")


SAMPLER = " A correction of its sampler lies beside it, which takes back quantization noise once it is applied."


def card_text(folder: Path, recipe: Recipe, summary: dict[str, Any] | None, source: str | Path) -> str:
    """Return the card of an export as Markdown with a YAML head."""
    index = read_json(folder / "model_index.json")
    part = _denoiser_of(folder)
    config = read_json(folder / part / "config.json") if part else {}
    bits = config.get("quantization_config", {}).get("avg_bits", recipe.avg_bits)
    head = _head(index, source)
    origin = head.get("base_model", Path(recipe.model).name)  # a place on somebody's disk tells nobody anything
    title = f"{Path(recipe.model).name}" + (f", {bits:.2f} bits per weight" if bits is not None else ", quantized")
    left = left_in(folder)
    other = f" Also quantized: {', '.join(recipe.components)}." if recipe.components else ""
    corrected = (folder / CORRECTION_FILE).is_file()
    loading = snippet(folder, index, None if summary is None else summary.get("example"), corrected=corrected)
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {title}",
        f"A {index.get('_class_name')} whose denoiser ({config.get('_class_name')}) is quantized layer by layer with "
        f"quantdm, from `{origin}`.{other}{_inputs(recipe)}{SAMPLER if corrected else ''}"
        + ("" if left is None else f" {left[0].upper()}{left[1:]}."),
        _parts(folder, index),
        f"## Load it\n\n```python\n{loading}\n```",
        "## Results\n\n" + (_results(summary) if summary is not None else _unmeasured(recipe)),
        "## Recipe\n\n" + _recipe(recipe),
        "## Limits\n\n" + LIMITS,
    ]
    return "\n\n".join(sections) + "\n"


def _inputs(recipe: Recipe) -> str:
    """Say that activations are quantized when the export is opened, or nothing."""
    spec = recipe.activations
    return "" if spec is None else f" While it runs its inputs are rounded, as it is opened: {spec.description}."


def _head(index: dict[str, Any], source: str | Path) -> dict[str, Any]:
    head = {"library_name": "diffusers", "pipeline_tag": task_of(signature_of(index), index)}
    return head | head_of_source(source) | {"tags": ["quantdm", "quantized", "mixed-precision"]}


def _parts(folder: Path, index: dict[str, Any]) -> str:
    """Return the table of everything in the directory that has weights."""
    lines = ["| part | class | weight files | weights |", "|---|---|---|---|"]
    for name in sorted(entry for entry, value in index.items() if isinstance(value, list)):
        size = _bytes(folder / name)
        if size:
            config = folder / name / "config.json"
            settings = (read_json(config) if config.is_file() else {}).get("quantization_config") or {}
            bits = settings.get("avg_bits")
            kept = "as they were" if not settings else "quantized" if bits is None else f"{bits:.2f} bits per weight"
            lines.append(f"| {name} | {index[name][1]} | {size / 1e6:,.2f} MB | {kept} |")
    total = sum(_bytes(folder / name) for name in index if (folder / name).is_dir())
    opened = (
        f"Opened, the weights take {total / 1e6:,.2f} MB of memory: codes stay packed, and are decoded layer by layer."
    )
    return "\n".join([*lines, f"| all | | {total / 1e6:,.2f} MB | |", "", opened])


def _results(summary: dict[str, Any]) -> str:
    protocol, noise = summary["protocol"], summary["fp_noise"]["mean"]
    scale = protocol["guidance_scale"]
    guidance = "as the pipeline has it" if scale is None else f"{scale:g}"
    apart = "" if noise is None else f"; two full-precision draws of different noises are {noise:.4f} apart"
    lines = [
        "| weights | bits | denoiser | fid_fp | PSNR | FID to real images |",
        "|---|---|---|---|---|---|",
    ]
    for row in summary["rows"]:
        psnr = "-" if row.get("psnr_fp") is None else f"{row['psnr_fp']:.1f} dB"
        real = f"{row['fid_real']:.3f}" if row.get("fid_real") is not None else "-"
        size = f"{row['avg_bits']:.2f} | {row['denoiser_bytes'] / 1e6:,.2f} MB"
        lines.append(f"| {row['name']} | {size} | {spread(row['fid_fp'], row['fid_fp_sd'])} | {psnr} | {real} |")
    return "\n".join(lines) + (
        f"\n\nMeans over {counted(len(protocol['draws']), 'draw')} of {protocol['images']} images (seeds "
        f"{', '.join(map(str, protocol['draws']))}), {protocol['steps']} steps, guidance "
        f"{guidance}. `fid_fp` is the Frechet distance to the full-precision images of the same "
        f"noises ({protocol['features']} features; {protocol['fid']}){apart}. "
        f"{_blank(summary['rows'])}Figures compare rows of this table, not other papers'."
    )


def _blank(rows: list[dict[str, Any]]) -> str:
    """Say which images show nothing, in a sentence with a space behind it, or nothing where all do."""
    found = [
        f"{row['name']} {row['flagged']} and {row['constant']}"
        for row in rows
        if row.get("flagged") or row.get("constant")
    ]
    if not found:
        return ""
    return f"Images that a safety checker flagged, and others of one colour only: {', '.join(found)}. "


def _unmeasured(recipe: Recipe) -> str:
    if not recipe.provenance.measured:
        return f"This export was not measured. Where the recipe comes from: {recipe.provenance.source}."
    rows = "\n".join(f"| {key} | {value:.4g} |" for key, value in recipe.provenance.measured.items())
    return f"Measured when the recipe was made ({recipe.provenance.source}):\n\n| figure | value |\n|---|---|\n{rows}"


def _recipe(recipe: Recipe) -> str:
    told = [f"Source: {recipe.provenance.source}."]
    fields = (("reference", "Reference"), ("target", "Target"), ("seed", "Seed"), ("trials", "Trials"))
    told += [
        f"{name}: {getattr(recipe.provenance, key)}."
        for key, name in (*fields, ("quantdm", "quantdm"))
        if getattr(recipe.provenance, key) is not None
    ]
    told += [f"{note}." for note in recipe.provenance.notes]
    text = recipe.to_yaml()
    block = f"```yaml\n{text}```"
    if text.count("\n") > FOLD_LINES:
        block = f"<details>\n<summary>recipe.yaml, {text.count(chr(10))} lines</summary>\n\n{block}\n\n</details>"
    return " ".join(told) + "\n\n" + block


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
