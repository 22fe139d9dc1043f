"""``refimpl train``, ``extend``, ``sft``, ``grpo``, ``reward-model``, ``distil``: the stages of the
recipe, with nearly the same options."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ..train.run import Interrupted, shown
from ..train.settings import make_settings, read_tables, toml_value
from ..train.stages import SHARED, STAGES, run_stage
from .app import app, console
from .ranks import ContextParallel, DataParallel, ExpertParallel, RankCount, Timeout, joined

HELP = {
    "train": "Pre-train a model on text.\n\nWith MTP, bias balancing, and V3's schedules in small.",
    "extend": "Extend a model's context by YaRN, in phases.",
    "sft": "Fine-tune on solved problems.\n\nOnly the tokens of completions count in the loss.",
    "grpo": "Reinforce by GRPO with rule-based rewards.",
    "reward-model": "Train a reward model on pairs that a rule orders.",
    "distil": "Fine-tune a student on a teacher's solutions.\n\nThe rules choose the solutions.",
}
Option = typer.Option
SHARING = {"ranks", "data_parallel", "context_parallel", "expert_parallel", "timeout"}


def command(
    out: Annotated[Path, Option(help="Folder of the run; new or empty, unless with --resume.")],
    settings: Annotated[Path | None, Option(help="TOML file with a table per stage.")] = None,
    set_: Annotated[
        list[str] | None,
        Option("--set", help="A setting, such as steps=200; may be given several times."),
    ] = None,
    resume: Annotated[bool, Option(help="Continue the run in --out where it stopped.")] = False,
    checkpoint: Annotated[
        str | None, Option(help="Model to begin with: folder of a checkpoint or finished run.")
    ] = None,
    teacher: Annotated[
        str | None,
        Option(help="Model that solves the problems: folder of a checkpoint or finished run."),
    ] = None,
    text: Annotated[
        str | None,
        Option(help="Text file, or folder of text files; default: English text of CPython."),
    ] = None,
    seed: Annotated[int | None, Option(help="Seed of all random numbers.")] = None,
    backend: Annotated[str | None, Option(help="numpy, or cupy for a GPU.")] = None,
    implementation: Annotated[
        str | None, Option(help="Implementation of the ops; default: the fastest installed.")
    ] = None,
    dtype: Annotated[
        str | None, Option(help="Type: float32, float64, or on a GPU bfloat16.")
    ] = None,
    fp8: Annotated[
        str | None, Option(help="Choices of the implementation fp8, as in scale=ue8m0,promote=0.")
    ] = None,
    ranks: RankCount = None,
    data_parallel: DataParallel = None,
    context_parallel: ContextParallel = 1,
    expert_parallel: ExpertParallel = 1,
    timeout: Timeout = 300.0,
    *,
    stage: str,
) -> None:
    given: dict[str, Any] = {
        "checkpoint": checkpoint,
        "teacher": teacher,
        "text": text,
        "seed": seed,
        "backend": backend,
        "implementation": implementation,
        "dtype": dtype,
        "fp8": fp8,
    }
    tables = read_tables(settings)
    chosen = make_settings(
        STAGES[stage].settings,
        stage,
        tables,
        set_ or [],
        {name: x for name, x in given.items() if x is not None},
    )
    together = joined(ranks, data_parallel, context_parallel, expert_parallel, timeout)
    first = together is None or together.rank == 0
    try:
        result = run_stage(stage, out, chosen, resume=resume, ranks=together)
    except Interrupted as stopped:
        if first:
            typer.echo(f"refimpl: {stopped} --resume", err=True)
        raise typer.Exit(130) from stopped
    if not first:
        return
    console().print(f"{stage}: {result['steps']:,} steps, {shown(result['evaluation'])}")
    console().print(f"the result is {out / 'checkpoint'}")


def add(stage: str) -> None:
    """The stage's command: the options above that are settings of it, and those of every run."""
    settings = fields(STAGES[stage].settings)
    left_out = {"checkpoint", "teacher", "text"} - {x.name for x in settings} | {"stage"}
    left_out |= set() if stage in SHARED else SHARING

    def run(**given: Any) -> None:
        command(**given, stage=stage)

    signature = inspect.signature(command, eval_str=True)
    parameters = [x for name, x in signature.parameters.items() if name not in left_out]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    named = ", ".join(f"{x.name}={toml_value(default(x))}" for x in settings)
    source = STAGES[stage].settings.__module__.replace(".", "/")
    run.__doc__ = (
        f"{HELP[stage]}\n\nSettings and their defaults: {named}. {source}.py explains the settings "
        "of this stage, and refimpl/train/stage.py those of all stages."
    )
    app.command(stage)(run)


def default(setting: Field[Any]) -> Any:
    if setting.default_factory is not MISSING:
        return setting.default_factory()
    return setting.default


for name in STAGES:
    add(name)
