"""The model card of an export: what it is, what was measured, how to load it, its recipe, and what it cannot do."""

from pathlib import Path
from typing import Any

import yaml

from quantdm.errors import QuantDMError
from quantdm.files import MARKUP_COMMENT, check_output, check_replaceable, read_json, write_text
from quantdm.hub.export import configuration_digest
from quantdm.hub.header import read_headers
from quantdm.hub.replace import CARD, CORRECTION_FILE, INDEX, RECIPE_FILE
from quantdm.metrics.statistics import spread
from quantdm.pipelines.parts import DENOISER_NAMES
from quantdm.recipe import Recipe, load_recipe

SUMMARY_VERSION = 1
FOLD_LINES = 40  # a longer recipe is folded

LIMITS = """\
- Import quantdm before loading: without it diffusers refuses the checkpoint, and transformers would not understand a
  quantized text encoder.
- Fewer weight bits make the model smaller, not faster: layers decode their weights when they run.
- Quantized weights cannot be trained or fused with a LoRA; a LoRA beside them works.
- The licence and the terms of use of the original model hold for this one too, and so do its own limits and biases."""


def write_card(folder: str | Path, *, summary: str | Path | None = None) -> Path:
    """Write the model card of an export: with it the directory is ready for the Hub.

    Args:
        folder: a directory that `export_pipeline` wrote.
        summary: summary.json of the run that measured the recipe; without it the card says that nothing was measured.

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
    write_text(folder / CARD, card_text(folder, recipe, measured), MARKUP_COMMENT)
    return folder / CARD


def _check_measured(folder: Path, recipe: Recipe, where: str, summary: dict[str, Any]) -> None:
    """Check that a row of a summary measured just this export: its packed weights, activations, correction, tuning."""
    part = _denoiser_of(folder)
    config = read_json(folder / part / "config.json").get("quantization_config", {})
    header, _ = read_headers(sorted((folder / part).glob("*.safetensors")))
    labels = {name: entry.scheme.label for name, entry in header.table.items()}
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


def card_text(folder: Path, recipe: Recipe, summary: dict[str, Any] | None) -> str:
    """Return the card of an export as Markdown with a YAML head."""
    index = read_json(folder / "model_index.json")
    part = _denoiser_of(folder)
    config = read_json(folder / part / "config.json") if part else {}
    bits = config.get("quantization_config", {}).get("avg_bits", recipe.avg_bits)
    sizes = {path.name: _bytes(path) for path in sorted(folder.iterdir()) if path.is_dir() and _bytes(path)}
    parts = ", ".join(f"{name} {size / 1e6:,.2f} MB" for name, size in sizes.items())
    title = f"{Path(recipe.model).name}" + (f", {bits:.2f} bits per weight" if bits is not None else ", quantized")
    other = f" Also quantized: {', '.join(recipe.components)}." if recipe.components else ""
    sections = [
        f"---\n{yaml.safe_dump(_head(recipe, index), sort_keys=False)}---",
        f"# {title}",
        f"A {index.get('_class_name')} whose denoiser ({config.get('_class_name')}) is quantized layer by layer with "
        f"quantdm, from `{recipe.model}`.{other}{_inputs(recipe)} Weight files: {parts}.",
        f"## Load it\n\n```python\n{snippet(folder, index, config)}\n```",
        "## Results\n\n" + (_results(summary) if summary is not None else _unmeasured(recipe)),
        "## Recipe\n\n" + _recipe(recipe),
        "## Limits\n\n" + LIMITS,
    ]
    return "\n\n".join(sections) + "\n"


def _inputs(recipe: Recipe) -> str:
    """Say that activations are quantized when the export is opened, or nothing."""
    spec = recipe.activations
    return "" if spec is None else f" While it runs its inputs are rounded, as it is opened: {spec.description}."


def snippet(folder: Path, index: dict[str, Any], config: dict[str, Any]) -> str:
    """Return Python that loads an export and generates one image; it runs where the directory lies."""
    has_classes = config.get("num_embeds_ada_norm") is not None or config.get("num_class_embeds") is not None
    ask = '"a photo of a lighthouse"' if index.get("tokenizer") else "class_labels=[1]" if has_classes else ""
    lines = [
        "from diffusers import DiffusionPipeline",
        "",
        "import quantdm  # makes itself known to diffusers and transformers",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{folder.name}")  # or its name on the Hub',
    ]
    if (folder / "correction.safetensors").is_file():
        lines += [
            f'correction = quantdm.load_correction("{folder.name}/correction.safetensors")',
            "quantdm.apply_correction(pipe, correction)  # undoes quantization noise in the sampler",
        ]
    return "\n".join([*lines, f"image = pipe({ask}).images[0]"])


def _head(recipe: Recipe, index: dict[str, Any]) -> dict[str, Any]:
    task = "text-to-image" if index.get("tokenizer") else "unconditional-image-generation"
    head: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": task}
    if recipe.model.count("/") == 1 and not Path(recipe.model).is_absolute():
        head |= {"base_model": recipe.model, "base_model_relation": "quantized"}
    return head | {"tags": ["quantdm", "quantized", "mixed-precision"]}


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
        f"\n\nMeans over {len(protocol['draws'])} draws of {protocol['images']} images (seeds "
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
