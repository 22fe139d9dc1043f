"""The stages by name, and how each is run from its settings. A stage is made before its folder:
impossible settings leave no folder behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..files import held
from ..parallel.ranks import Ranks
from .distil import DistilSettings, sample_solutions
from .extend import Extend, ExtendSettings
from .grpo import GRPO, GRPOSettings
from .machine import Machine, use_own_device
from .pretrain import Pretrain, PretrainSettings
from .reward_model import RewardModelSettings, RewardModelStage
from .run import Live, Metrics, run
from .save import PHASE, RunFolder, expect_place
from .settings import expect_setting, possible
from .sft import OWN, SFT, SFTSettings, begin_sft, read_solutions, write_solutions
from .shared import SharedStage
from .stage import BaseSettings, begin_from, digest_of, open_run, recorded

__all__ = ["STAGES", "run_stage"]


class Kind(NamedTuple):
    settings: type[BaseSettings]
    run: Callable[[Path, Any, Machine, bool], Metrics]


def run_stage(
    name: str,
    path: Path,
    settings: BaseSettings,
    *,
    resume: bool = False,
    ranks: Ranks | None = None,
) -> Metrics:
    """Run a stage in the folder ``path``, which no other process may use meanwhile but the other
    ``ranks``, which run it too; the result."""
    if ranks is not None:
        expect_setting(name in SHARED, "ranks", f"be left out: {', '.join(SHARED)} take it", name)
    with held(path) if ranks is None or ranks.rank == 0 else nullcontext():
        begun = partial(expect_place, path, resume=resume)
        begun() if ranks is None else ranks.world.first(begun)
        machine = replace(settings.machine(), ranks=ranks)
        if ranks is not None and machine.backend == "cupy":
            use_own_device(ranks.rank)
        return STAGES[name].run(path, settings, machine, resume)


def run_shared(stage: Pretrain | SFT, folder: RunFolder) -> Metrics:
    """`run`, by all ranks of the stage's machine; the first shows the line."""
    ranks = stage.machine.ranks
    if ranks is None:
        return run(stage, folder, live=live(stage.name))
    stream = sys.stderr if ranks.rank == 0 else None
    return run(SharedStage(stage, ranks), folder, live=Live(stage.name, stream))


def run_pretrain(path: Path, settings: PretrainSettings, machine: Machine, resume: bool) -> Metrics:
    with possible():
        stage = Pretrain(settings, machine)
    folder = open_run(path, machine, "train", settings, stage.inputs, resume=resume)
    return run_shared(stage, folder)


def run_extend(path: Path, settings: ExtendSettings, machine: Machine, resume: bool) -> Metrics:
    """Its phases, each a run; the last one in ``path`` itself, earlier ones below it."""
    result: Metrics = {}
    checkpoint = settings.checkpoint
    phases = len(settings.factors)
    for phase in range(phases):
        place = path if phase == phases - 1 else path / f"{PHASE}{phase + 1}"
        with possible():
            stage = Extend(settings, machine, begin_from(checkpoint, machine), phase)
        if recorded(checkpoint, "text") not in (None, stage.inputs["text"]):
            print(
                "extend: this is another text than the checkpoint was trained on, which may have "
                "read what is held out here",
                file=sys.stderr,
            )
        of_phase = replace(settings, checkpoint=checkpoint)
        given = inputs(of_phase) | stage.inputs
        folder = open_run(place, machine, "extend", of_phase, given, resume=True)
        if not (folder.finished and phase < phases - 1):
            result = run(stage, folder, live=live("extend"))
        checkpoint = str(place)
    return result


def run_sft(path: Path, settings: SFTSettings, machine: Machine, resume: bool) -> Metrics:
    with possible():
        stage = SFT(settings, machine, begin_sft(settings, machine))
    folder = open_run(path, machine, "sft", settings, inputs(settings), resume=resume)
    return run_shared(stage, folder)


def run_distil(path: Path, settings: DistilSettings, machine: Machine, resume: bool) -> Metrics:
    """The teacher's solutions, once, and then a fine-tuning on them."""
    with possible():
        stage = SFT(settings, machine, begin_sft(settings, machine))
    expect_setting(bool(settings.teacher), "teacher", "name a checkpoint", settings.teacher)
    given, solutions = inputs(settings), path / "solutions.jsonl"
    if begun := solutions.exists():
        stage.give(read_solutions(solutions))
    else:
        pairs, accepted = sample_solutions(settings, machine)
        print(f"distil: {accepted:,} of {settings.sampled:,} solutions accepted", file=sys.stderr)
        stage.give(pairs)
    folder = open_run(path, machine, "distil", settings, given, resume=resume)
    if not begun:
        write_solutions(solutions, pairs)
    stage.name = "distil"
    return run(stage, folder, live=live("distil"))


def run_grpo(path: Path, settings: GRPOSettings, machine: Machine, resume: bool) -> Metrics:
    with possible():
        stage = GRPO(settings, machine, begin_from(settings.checkpoint, machine))
    folder = open_run(path, machine, "grpo", settings, inputs(settings), resume=resume)
    return run(stage, folder, live=live("grpo"))


def run_reward_model(
    path: Path, settings: RewardModelSettings, machine: Machine, resume: bool
) -> Metrics:
    with possible():
        stage = RewardModelStage(settings, machine, begin_from(settings.checkpoint, machine))
    folder = open_run(path, machine, "reward-model", settings, inputs(settings), resume=resume)
    return run(stage, folder, live=live("reward-model"))


def inputs(settings: Any) -> dict[str, str]:
    """The digests of the checkpoints and the file of solutions that a stage reads."""
    names = ["checkpoint", "teacher", "reward_model"]
    if getattr(settings, "solutions", OWN[0]) not in OWN:
        names.append("solutions")
    given = {name: getattr(settings, name, "") for name in names}
    return {name: digest_of(x) for name, x in given.items() if x}


def live(name: str) -> Live:
    return Live(name, sys.stderr)


SHARED = ("train", "sft")
"""The stages that several ranks can run."""

STAGES = {  # by the command's name: the settings' class, and what runs it
    "train": Kind(PretrainSettings, run_pretrain),
    "extend": Kind(ExtendSettings, run_extend),
    "sft": Kind(SFTSettings, run_sft),
    "grpo": Kind(GRPOSettings, run_grpo),
    "reward-model": Kind(RewardModelSettings, run_reward_model),
    "distil": Kind(DistilSettings, run_distil),
}
