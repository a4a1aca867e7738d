"""Sub-commands of the search: the whole of it, and stage by stage."""

from typing import Annotated, Any

import typer

from quantdm.cli.app import (
    BatchSize,
    BegunRun,
    Device,
    DryRun,
    Dtype,
    EffortName,
    Embeddings,
    EngineName,
    ExampleInputs,
    Fidelity,
    LearnedFrom,
    Model,
    Options,
    Out,
    ProtocolFile,
    RayAddress,
    RunDir,
    Seed,
    TargetBits,
    TargetBytes,
    TargetPipelineBytes,
    Trials,
    Workers,
    app,
    batch_size_of,
    given_inputs,
    table_scheme,
)
from quantdm.cli.given import schemes_of
from quantdm.schemes import TABLE_SCHEME


@app.command(epilog="Example: quantdm bank digits-dit --run-dir runs/mine --target-bits 3.0")
def bank(
    model: Model,
    run_dir: RunDir,
    target_bits: TargetBits = None, target_bytes: TargetBytes = None, target_pipeline_bytes: TargetPipelineBytes = None,
    effort: EffortName = "normal", trials: Trials = None, options: Options = None,
    seed: Seed = 0,
    protocol: ProtocolFile = None,
    example_inputs: ExampleInputs = None,
    embeddings: Embeddings = TABLE_SCHEME.label,
    batch_size: BatchSize = "auto", device: Device = None, dtype: Dtype = None,
    learned_from: LearnedFrom = None,
) -> None:  # fmt: skip
    """Start a run and quantize every layer with every option (the first stage of `search`, alone)."""
    from quantdm.corridor.levels import level_of
    from quantdm.pipelines.protocol import load_protocol
    from quantdm.runs.failure import told_why
    from quantdm.runs.search import look_for_run, start_run
    from quantdm.runs.stages import build_bank, describe

    level, others = level_of(effort, trials=trials), learned_from or ()
    inputs = given_inputs(example_inputs)
    run, subject = start_run(
        look_for_run(model, run_dir, example_inputs=inputs, device=device, dtype=dtype, learned_from=others),
        run_dir,
        target_bits=target_bits,
        target_bytes=target_bytes,
        target_pipeline_bytes=target_pipeline_bytes,
        trials=level.trials,
        options=schemes_of(options) or level.options,
        effort=level.effort,
        seed=seed,
        protocol=None if protocol is None else load_protocol(protocol),
        embeddings=table_scheme(embeddings),
        dtype=dtype,
        learned_from=others,
    )
    with told_why(run.folder):
        describe(run, subject)
        build_bank(run, subject, batch_size=batch_size_of(batch_size))
    typer.echo(f"bank: {run.path('bank')}")


@app.command(epilog="Example: quantdm search digits-dit --run-dir runs/mine --target-bits 3.0")
def search(
    model: Model,
    run_dir: RunDir,
    target_bits: TargetBits = None, target_bytes: TargetBytes = None, target_pipeline_bytes: TargetPipelineBytes = None,
    effort: EffortName = "normal", trials: Trials = None, options: Options = None,
    seed: Seed = 0, protocol: ProtocolFile = None, workers: Workers = None,
    example_inputs: ExampleInputs = None,
    embeddings: Embeddings = TABLE_SCHEME.label,
    batch_size: BatchSize = "auto", device: Device = None, dtype: Dtype = None,
    engine: EngineName = "local", ray_address: RayAddress = None, fidelity: Fidelity = None,
    learned_from: LearnedFrom = None,
    dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Search the recipe of a size: bank, sensitivities, trials, surrogates, selection. Run it again to go on."""
    from quantdm.corridor.levels import level_of
    from quantdm.corridor.run import run
    from quantdm.pipelines.protocol import load_protocol
    from quantdm.runs.cheap import told
    from quantdm.runs.run import Run
    from quantdm.runs.search import search
    from quantdm.runs.trials import cheap_verdict

    level, schemes = level_of(effort, trials=trials), schemes_of(options)
    asked: dict[str, Any] = {
        "target_bits": target_bits, "target_bytes": target_bytes, "target_pipeline_bytes": target_pipeline_bytes,
        "run_dir": run_dir, "protocol": None if protocol is None else load_protocol(protocol), "seed": seed,
        "workers": workers, "example_inputs": given_inputs(example_inputs), "embeddings": table_scheme(embeddings),
        "batch_size": batch_size_of(batch_size), "device": device, "dtype": dtype, "engine": engine,
        "ray_address": ray_address, "fidelity": fidelity, "learned_from": learned_from or (),
    }  # fmt: skip
    if dry_run:
        run(model, effort=effort, trials=trials, options=schemes, dry_run=True, say=typer.echo, **asked)
        typer.echo("These are the stages of `quantdm run`; `search` ends with the verification.")
        return
    recipe = search(
        model, trials=level.trials, options=schemes or level.options, effort=level.effort, **asked
    )  # fmt: skip
    if (cheap := cheap_verdict(Run.open(run_dir))) is not None:
        typer.echo(told(cheap))
    typer.echo(f"recipe: {run_dir / 'recipe.yaml'}  ({recipe.avg_bits:.4f} bits per weight)")


@app.command(epilog="Example: quantdm fit --run-dir runs/mine")
def fit(run_dir: BegunRun) -> None:
    """Fit the surrogates on a run's trials and print how well they rank held-out configurations."""
    from quantdm.files import read_json
    from quantdm.runs.explain import fit_surrogates
    from quantdm.runs.run import Run
    from quantdm.runs.stages import load_space
    from quantdm.runs.trials import load_labels

    run = Run.open(run_dir)
    space = load_space(run)
    fit_surrogates(run, space, *load_labels(run, space))
    scores = read_json(run.path("surrogate.json"))
    for name, folds in scores["held_out_spearman"].items():
        ndcg = scores["held_out_ndcg"][name]
        typer.echo(
            f"{name:<22} Spearman {sum(folds) / len(folds):.3f} (folds {min(folds):.3f} to {max(folds):.3f})  "
            f"NDCG@10 {sum(ndcg) / len(ndcg):.3f}"
        )
    for name, value in scores["without_learning"].items():
        typer.echo(f"{name:<22} Spearman {value:.3f}  (nothing learned)")


@app.command(epilog="Example: quantdm select --run-dir runs/mine --target-bits 3.5 -o recipe-3.5.yaml")
def select(
    run_dir: BegunRun,
    out: Out,
    target_bits: Annotated[float | None, typer.Option(help="Average bits per weight, overhead included.")] = None,
    target_bops: Annotated[
        float | None, typer.Option(help="Bit operations of a call with one sample: activations are chosen as well.")
    ] = None,
    target_pipeline_bytes: Annotated[
        int | None, typer.Option(help="Bytes of all weight files: text encoders and VAE are in the budget as well.")
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="What chooses: additive, tree, graph, sensitivity; default: what won.")
    ] = None,
) -> None:
    """Choose a recipe of another size from a run's attributions (predicted, not measured).

    With --target-bops, schemes of weights and of inputs are chosen together from their one-layer errors. With
    --target-pipeline-bytes every part of the pipeline gets its share, by images of that part alone.
    """
    from quantdm.errors import QuantDMError
    from quantdm.recipe import check_recipe_path
    from quantdm.runs.operations import select_within
    from quantdm.runs.resize import select_recipe
    from quantdm.runs.run import Run
    from quantdm.runs.whole import select_pipeline

    check_recipe_path(out)
    if target_pipeline_bytes is not None and (target_bops, target_bits) != (None, None):
        raise QuantDMError("select: --target-pipeline-bytes is a target of its own; leave the others out")
    if target_bops is not None:
        recipe = select_within(Run.open(run_dir), target_bops=target_bops, target_bits=target_bits)
    elif target_pipeline_bytes is not None:
        split = select_pipeline(Run.open(run_dir), target_bytes=target_pipeline_bytes, by=by)
        typer.echo(str(split))
        recipe = split.recipe
    elif target_bits is not None:
        recipe = select_recipe(Run.open(run_dir), target_bits=target_bits, by=by)
    else:
        raise QuantDMError("select: give --target-bits, --target-bops or both, or --target-pipeline-bytes")
    typer.echo(f"recipe: {recipe.save(out)}  ({recipe.avg_bits:.4f} bits per weight, {recipe.provenance.source})")
