"""The verbs that put numbers on models: evaluate, compare, demo."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mxtorq.console import (
    OUT,
    keep_record,
    progress_bars,
    report_results,
    report_written,
    require_report,
    require_writable,
    resumed,
    signed,
    speaking,
)
from mxtorq.errors import UsageError
from mxtorq.options import (
    MODEL_HELP,
    Against,
    BatchSize,
    Calibration,
    CalibrationTokens,
    Device,
    Engine,
    EvalTokens,
    Json,
    Limit,
    Markdown,
    Methods,
    MismatchTargets,
    Original,
    Outliers,
    OutliersList,
    OwnFamily,
    RecipeFiles,
    RecordJson,
    Report,
    Resume,
    Roundings,
    Rule,
    Rules,
    Seed,
    Seeds,
    Seqlen,
    Targets,
    TaskFiles,
    Tasks,
    TensorParallel,
    Text,
    Unfit,
    agreed,
    every_choice,
    whole_number,
)

if TYPE_CHECKING:
    from mxtorq.config import EvaluationPlan, Recipe
    from mxtorq.evaluation.tasks import TaskPlan
    from mxtorq.models.family import Family
    from mxtorq.reports.published import Published

from mxtorq.cli.app import app, given

DEFAULT_METHODS = "identity,hadamard,torq"
ONE_ROUNDING = "rtn"
"""Of methods that are compared by name, unless roundings are named too."""
DEMO_METHODS = "identity,hadamard,torq,duquant++,wush"
DEMO_OUTLIERS = "qwen3-0.6b"


@app.command(
    epilog="Examples:\n\n"
    "  mxtorq evaluate reference\n\n"
    "  mxtorq evaluate my-checkpoint --text wikitext2:wiki.test.raw --seqlen 2048 --json out.json"
    "\n\n"
    "  mxtorq evaluate my-checkpoint --targets vllm-blackwell,vllm-emulation"
    "\n\n  mxtorq evaluate my-checkpoint --original ./llama --report fidelity.html"
    "\n\n  mxtorq evaluate my-checkpoint --tasks acc7 --json out.json --resume"
)
def evaluate(
    model: Annotated[
        str, typer.Argument(help=f"{MODEL_HELP} Or a checkpoint of mxtorq.")
    ] = "reference",
    text: Text = None,
    eval_tokens: EvalTokens = None,
    seqlen: Seqlen = None,
    seed: Seed = None,
    outliers: Outliers = None,
    family: OwnFamily = None,
    targets: MismatchTargets = None,
    original: Original = None,
    device: Device = "auto",
    tasks: Tasks = None,
    task_files: TaskFiles = None,
    limit: Limit = None,
    batch_size: BatchSize = "auto",
    engine: Engine = "torch",
    tensor_parallel: TensorParallel = 1,
    json_path: Json = None,
    resume: Resume = False,
    report: Report = None,
) -> None:
    """Perplexity of MODEL in BF16, or of a checkpoint in MXFP4 W4A4; with --tasks also accuracy.

    With --original also how far a checkpoint is from the model that it was made from.
    """
    with speaking("the tasks that were finished are in the --json record, if you named one"):
        from mxtorq import pipeline
        from mxtorq.config import parse_family, parse_target, plan_from

        plan = plan_from(given(text=text, eval_tokens=eval_tokens, seqlen=seqlen))
        others = [parse_target(name) for name in (targets or "").split(",") if name]
        asked = _task_plan(tasks, task_files, limit, batch_size, engine, tensor_parallel)
        require_writable(json_path)
        require_report(report, json_path)
        done = resumed(json_path, resume) if asked is not None or resume else None
        with progress_bars() as progress:
            results = pipeline.evaluate(
                model,
                plan,
                outliers=outliers,
                seed=seed or 0,
                device=device,
                family=parse_family(family),
                targets=others,
                original=original,
                progress=progress,
                tasks=asked,
                done=done,
                save=lambda so_far: keep_record(json_path, so_far, done),
            )
        title = f"Perplexity of {model}"
        signed_results = signed(results, done)
        report_results(signed_results, json_path, title, report_path=report, fidelity=True)


@app.command(
    epilog="Examples:\n\n"
    "  mxtorq compare reference --outliers none,qwen3-0.6b --roundings rtn,gptq\n\n"
    "  mxtorq compare ./llama --methods identity,hadamard,torq --seeds 0,1,2 "
    "--text wikitext2:wiki.test.raw --calibration notes.jsonl --json results.json --resume\n\n"
    "  mxtorq compare ./llama --recipe recipes/torq.toml --recipe recipes/duquant++.toml"
    "\n\n  mxtorq compare NousResearch/Meta-Llama-3-8B --recipe recipes/paper-rtn.toml "
    "--against docs/published.toml"
    "\n\n  mxtorq compare ./llama --tasks acc7 --task-files tasks --json tasks.json"
)
def compare(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)] = "reference",
    recipe: RecipeFiles = None,
    methods: Methods = None,
    roundings: Roundings = None,
    scale_rules: Rules = None,
    targets: Targets = None,
    seeds: Seeds = None,
    outliers: OutliersList = None,
    calibration: Calibration = None,
    calibration_tokens: CalibrationTokens = None,
    text: Text = None,
    eval_tokens: EvalTokens = None,
    seqlen: Seqlen = None,
    allow_unfit: Unfit = None,
    family: OwnFamily = None,
    device: Device = "auto",
    tasks: Tasks = None,
    task_files: TaskFiles = None,
    limit: Limit = None,
    batch_size: BatchSize = "auto",
    json_path: RecordJson = None,
    resume: Resume = False,
    markdown: Markdown = None,
    report: Report = None,
    against: Against = None,
) -> None:
    """One table in one run: BF16 first, then methods x roundings x scale rules x seeds.

    With --tasks every row also gets its accuracies, in a table of their own.
    """
    shared = given(
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        seqlen=seqlen,
        allow_unfit=allow_unfit,
    )
    lists = given(
        rounding=roundings, scale_rule=scale_rules, target=targets, seed=seeds, outliers=outliers
    )
    with speaking("the rows that were finished are in the --json record, if you named one"):
        from mxtorq.config import parse_family, plan_from, read_settings, recipe_from
        from mxtorq.reports.published import read_published

        beside = None if against is None else read_published(against)
        read = [read_settings(path) for path in recipe or []]
        bases = [settings for settings, _ in read]
        names = methods or ("" if bases else DEFAULT_METHODS)
        # One rounding for all: rows differ in what they name.
        bases += [{"method": name, "rounding": ONE_ROUNDING} for name in names.split(",") if name]
        recipes = [
            recipe_from({**base, **shared, **choice})
            for choice in every_choice(lists)
            for base in bases
        ]
        plans = [evaluation for _, evaluation in read if evaluation]
        plan = plan_from(
            {**agreed(plans), **given(text=text, eval_tokens=eval_tokens, seqlen=seqlen)}
        )
        own = parse_family(family)
        asked = _task_plan(tasks, task_files, limit, batch_size)
        records = json_path, model, own, resume, markdown, report, beside, asked
        _compare(model, recipes, plan, device, *records)


@app.command(epilog="Example:\n\n  mxtorq demo --json demo.json")
def demo(
    methods: Methods = DEMO_METHODS,
    rounding: Annotated[
        str, typer.Option("--rounding", help="Of all rows after direct rounding to nearest.")
    ] = "gptq",
    scale_rule: Rule = None,
    outliers: Annotated[
        str, typer.Option("--outliers", help="The profile of the second half.")
    ] = DEMO_OUTLIERS,
    calibration_tokens: Annotated[
        int, typer.Option("--calibration-tokens", help="Tokens to calibrate on, in whole windows.")
    ] = 16_384,
    eval_tokens: Annotated[
        int, typer.Option("--eval-tokens", help="Tokens to evaluate on.")
    ] = 32_768,
    seed: Seed = None,
    json_path: Json = None,
    keep: Annotated[
        Path | None,
        typer.Option("--out", metavar="OUT", help="Also keep the TORQ checkpoint here."),
    ] = None,
) -> None:
    """The whole path on the reference model: methods beside each other, no network, no GPU.

    Direct rounding to nearest first, then each method with GPTQ, without and with outlier channels.

    Ends with a TORQ checkpoint written to disk, read back and compared with the model in memory.
    """
    shared = given(scale_rule=scale_rule, calibration_tokens=calibration_tokens, seed=seed)
    with speaking("no results were written"):
        import tempfile

        from mxtorq import pipeline
        from mxtorq.config import plan_from, recipe_from
        from mxtorq.export.output import require_absent
        from mxtorq.loading.source import REFERENCE

        rows = [{"method": "identity", "rounding": ONE_ROUNDING}]
        rows += [
            {"method": name, "rounding": rounding} for name in (methods or DEMO_METHODS).split(",")
        ]
        recipes = [
            recipe_from({**shared, **row, "outliers": profile})
            for profile in (None, outliers)
            for row in rows
        ]
        if keep is not None:
            require_absent(keep)
        title = "The reference model in MXFP4 W4A4, without and with outlier channels"
        plan = plan_from({"eval_tokens": eval_tokens})
        _compare(REFERENCE, recipes, plan, "cpu", json_path, title)
        with tempfile.TemporaryDirectory() as scratch:
            out = keep or Path(scratch) / "reference-torq"
            final = recipe_from(
                {**shared, "method": "torq", "rounding": rounding, "outliers": outliers}
            )
            with progress_bars() as progress:
                manifest = pipeline.quantize(REFERENCE, out, final, device="cpu", progress=progress)
            report_written(out, manifest)
            if keep is None:
                OUT.print("It was a demonstration and is gone again; --out OUT keeps it.")


def _task_plan(
    tasks: str | None,
    files: Path | None,
    limit: int | None,
    batch_size: str,
    engine: str = "torch",
    tensor_parallel: int = 1,
) -> "TaskPlan | None":
    """What --tasks and the options beside it ask; None without it."""
    from mxtorq.evaluation.tasks import TaskPlan, parse_tasks

    if tasks is None and (files, limit, batch_size) != (None, None, "auto"):
        raise UsageError(
            asked="--task-files, --limit or --batch-size",
            found="no --tasks",
            why="these say how tasks are asked, and none is",
            todo="name tasks, as in --tasks acc7",
        )
    if tasks is None:
        return None
    return TaskPlan(
        tasks=parse_tasks(tasks),
        files=files,
        limit=limit,
        batch_size=whole_number("--batch-size", batch_size),
        engine=engine,
        tensor_parallel=tensor_parallel,
    )


def _compare(
    model: str,
    recipes: "list[Recipe]",
    plan: "EvaluationPlan",
    device: str,
    json_path: Path | None,
    title: str,
    family: "Family | None" = None,
    resume: bool = False,
    markdown: Path | None = None,
    report: Path | None = None,
    against: "Published | None" = None,
    tasks: "TaskPlan | None" = None,
) -> None:
    from mxtorq.comparison import compare

    require_writable(markdown)
    require_report(report, json_path, markdown)
    done = resumed(json_path, resume)
    with progress_bars() as progress:
        results = compare(
            model,
            recipes,
            plan,
            device=device,
            family=family,
            progress=progress,
            tasks=tasks,
            done=done,
            save=lambda so_far: keep_record(json_path, so_far, done),
        )
    report_results(signed(results, done), json_path, title, markdown, report, against)
