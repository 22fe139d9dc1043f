"""A stage that several ranks run: each takes its part of every step, and the first evaluates,
records and saves for all.

What is saved is the whole state, as one process has it, so a run goes on with any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import ModelConfig
from ..errors import CouldNotRun
from ..parallel.ranks import Ranks
from .machine import Machine
from .run import Metrics, Stage
from .save import RunFolder
from .step import State

__all__ = ["SharedFolder", "SharedStage"]


class SharedStage:
    """A stage as each rank runs it, on the parts of the state that it holds."""

    def __init__(self, stage: Stage, ranks: Ranks) -> None:
        self.stage, self.ranks = stage, ranks
        self.name, self.config = stage.name, stage.config
        self.save_every, self.evaluate_every = stage.save_every, stage.evaluate_every
        self.jump = stage.jump
        self.progress, self.step = stage.progress, stage.step
        self.add_to_checkpoint = stage.add_to_checkpoint

    def start(self) -> State:
        return own_state(self.stage.start(), self.config, self.ranks)

    def evaluate(self, state: State) -> Metrics:
        whole = self.ranks.whole_parameters(state.params)

        def evaluated() -> Metrics:
            assert whole is not None  # on the first rank
            return self.stage.evaluate(state._replace(params=whole))

        return self.ranks.world.first(evaluated)


class SharedFolder(RunFolder):
    """The folder of a run of several ranks, in which the first writes."""

    def __init__(self, path: Path, machine: Machine, settings: str, ranks: Ranks) -> None:
        super().__init__(path, machine, settings)
        self.ranks = ranks

    def open(self, *, resume: bool) -> None:
        """As for one process; CouldNotRun too if a rank has other settings, or reads something
        else, than the first."""
        wanted, *others = (x.splitlines() for x in self.ranks.world.gather(self.settings))
        for rank, given in enumerate(others, 1):
            for ours, theirs in zip(wanted, given, strict=False):
                if ours != theirs:
                    raise CouldNotRun(f"ranks differ: rank {rank} has {theirs}, the first {ours}")
        self.ranks.world.first(lambda: RunFolder.open(self, resume=resume))

    def agreed(self, happened: bool) -> bool:
        return any(self.ranks.world.gather(happened))

    def save(self, state: State, *how: Any, **named: Any) -> Path:
        whole = whole_state(state, self.ranks)
        return self.ranks.world.first(lambda: RunFolder.save(self, whole, *how, **named))

    def latest(self, config: ModelConfig) -> State | None:
        state = RunFolder.latest(self, config)
        return None if state is None else own_state(state, config, self.ranks)

    def _cut_metrics(self, size: int) -> None:
        self.ranks.world.first(lambda: RunFolder._cut_metrics(self, size))

    def metrics(self) -> list[dict[str, Any]]:
        return self.ranks.world.first(lambda: RunFolder.metrics(self))

    def write_metrics(self, line: Mapping[str, Any]) -> None:
        if self.ranks.rank == 0:
            super().write_metrics(line)

    def finish(self, state: State, *how: Any, **named: Any) -> None:
        whole = whole_state(state, self.ranks)
        self.ranks.world.first(lambda: RunFolder.finish(self, whole, *how, **named))


def own_state(state: State, config: ModelConfig, ranks: Ranks) -> State:
    """What a rank keeps of a whole state."""
    return state._replace(
        params=ranks.own_parameters(state.params, config),
        moments=ranks.own_moments(state.moments, config),
    )


def whole_state(state: State, ranks: Ranks) -> State:
    """The whole state on the first rank; of no use on the others."""
    params = ranks.whole_parameters(state.params)
    moments = ranks.whole_moments(state.moments, state.params)
    if params is None or moments is None:
        return state
    return state._replace(params=params, moments=moments)
