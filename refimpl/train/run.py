"""The loop that all stages share: evaluate, step, record, save; stop cleanly, and resume.

What a step does is a function of settings and state alone, so a run that was killed and resumed has
the same bits as one that was not.
"""

from __future__ import annotations

import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn, Protocol, TextIO

from ..config import ModelConfig
from ..errors import CouldNotRun
from .save import RunFolder
from .step import NotTaken, State, not_finite

__all__ = ["Guard", "Interrupted", "Live", "Stage", "run"]

RECENT = 20  # losses that a jump is measured against
Metrics = dict[str, Any]


class Stage(Protocol):
    """What the loop needs of a stage."""

    name: str
    config: ModelConfig  # of the state's parameters
    save_every: int
    evaluate_every: int
    jump: float

    def start(self) -> State: ...

    def step(self, state: State, guard: Guard) -> tuple[State, Metrics]:
        """One step, and what it tells; ``guard`` is called with its loss before anything
        changes."""
        ...

    def evaluate(self, state: State) -> Metrics: ...

    def progress(self, state: State, evaluated: Metrics) -> float:
        """The share that is done, 1 at the end."""
        ...

    def add_to_checkpoint(self, state: State, folder: Path) -> None: ...


class Guard:
    """Stops a run whose loss jumps by more than ``jump`` above the median of the last steps'."""

    def __init__(self, jump: float, losses: Iterable[float] = ()) -> None:
        self.jump = jump
        self.recent = deque(losses, RECENT)  # one per step: `run` adds those that were taken

    def __call__(self, loss: float) -> None:
        """`NotTaken` if the loss of a step that was not taken yet jumps; what is not finite is for
        `apply_gradients` to say, which knows the tensors."""
        if len(self.recent) == RECENT and isfinite(loss):
            usual = statistics.median(self.recent)
            if loss > usual + self.jump:
                raise NotTaken(
                    f"the loss jumps to {loss:.4g}, {loss - usual:.3g} above the median of the "
                    f"last {RECENT} steps (allowed: jump={self.jump:g})"
                )


class Interrupted(Exception):
    """Ctrl-C: the state is saved. The message ends where the option to resume belongs."""


def run(stage: Stage, folder: RunFolder, *, live: Live | None = None) -> Metrics:
    """Run a stage to its end in ``folder``, which is open, from its latest state; the result, which
    result.json holds too.

    CouldNotRun if the folder can't be used, or a step can't be taken since loss or gradients are
    not finite or the loss jumps: then the state before that step is saved beside, to look into.
    `Interrupted` after Ctrl-C.
    """
    live = live or Live(stage.name, None)
    if folder.finished:
        raise CouldNotRun(f"{folder.path} holds a finished run: nothing was changed")
    state = folder.latest(stage.config) or stage.start()
    past = folder.metrics()
    guard = Guard(stage.jump, [x["loss"] for x in past if x["kind"] == "step"])
    evaluated: Metrics = next((x for x in reversed(past) if x["kind"] == "evaluation"), {})
    begin, first = time.perf_counter(), stage.progress(state, evaluated)
    with interrupts() as interrupted, live:
        while True:
            over = stage.progress(state, evaluated) >= 1
            due = over or state.step % stage.evaluate_every == 0
            if due and evaluated.get("step") != state.step:
                evaluated = {"kind": "evaluation", "step": state.step}
                with stopping(stage, state, folder, f"the model after step {state.step}"):
                    evaluated |= stage.evaluate(state)
                folder.write_metrics(evaluated)
                live.tell(evaluated)
            if (done := stage.progress(state, evaluated)) >= 1:
                break
            if folder.agreed(interrupted()):
                _stop(stage, state, folder)
            state, told = _step(stage, state, guard, folder)
            folder.write_metrics({"kind": "step", "step": state.step} | told)
            live.step(state.step, told, _left(begin, first, done))
            if state.step % stage.save_every == 0:
                folder.save(state, stage.config)
            if folder.agreed(interrupted()):  # before the evaluation, which may take long
                _stop(stage, state, folder)
    result = {
        "stage": stage.name,
        "steps": state.step,
        "tokens": state.tokens,
        "evaluation": {k: x for k, x in evaluated.items() if k not in ("kind", "step")},
    }
    folder.finish(state, stage.config, result, partial(stage.add_to_checkpoint, state))
    return result


def _stop(stage: Stage, state: State, folder: RunFolder) -> NoReturn:
    folder.save(state, stage.config)
    raise Interrupted(
        f"stopped after step {state.step}, which is saved: to resume, run the same command with"
    )


def _step(stage: Stage, state: State, guard: Guard, folder: RunFolder) -> tuple[State, Metrics]:
    """A step with its time, and the tokens that `State` counted in it per second."""
    begin = time.perf_counter()
    with stopping(stage, state, folder, f"step {state.step + 1}"):
        after, told = stage.step(state, guard)
    guard.recent.append(told["loss"])
    seconds = time.perf_counter() - begin
    speed = round((after.tokens - state.tokens) / seconds)
    return after, told | {"seconds": seconds, "tokens_per_second": speed}


@contextmanager
def stopping(stage: Stage, state: State, folder: RunFolder, what: str) -> Iterator[None]:
    """CouldNotRun, with the state saved, if ``what`` is stopped by numbers: a step that is not
    taken, or a model whose logits are not numbers."""
    try:
        yield
    except (NotTaken, ValueError) as error:
        reason = str(error)
        if isinstance(error, ValueError):
            name = not_finite(state.params)
            if name is None and "NaN" not in reason:
                raise
            reason = f"{name} is not finite" if name else reason
        add = partial(stage.add_to_checkpoint, state)
        saved = folder.save(state, stage.config, f"stopped-{state.step:06d}", add)
        raise CouldNotRun(f"stopped at {what}: {reason}; the state is saved in {saved}") from error


def _left(begin: float, first: float, done: float) -> float | None:
    """Seconds that are left, at the speed so far."""
    if done <= first:
        return None
    return (time.perf_counter() - begin) / (done - first) * (1 - done)


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C is remembered for the end of the step, and what is given says whether it came;
    a second one interrupts at once."""
    came = [False]

    def remember(number: int, frame: Any) -> None:
        if came[0]:
            raise KeyboardInterrupt
        came[0] = True

    try:
        before = signal.signal(signal.SIGINT, remember)
    except ValueError:  # not the main thread
        yield lambda: False
        return
    try:
        yield lambda: came[0]
    finally:
        signal.signal(signal.SIGINT, before)


class Live:
    """A line that moves with each step on a terminal; elsewhere a line per evaluation."""

    def __init__(self, name: str, stream: TextIO | None) -> None:
        self.name = name
        self.stream = stream
        self.moves = stream is not None and stream.isatty()
        self.last = 0.0

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()

    def step(self, step: int, told: Mapping[str, Any], left: float | None) -> None:
        """Show a step, at most five times a second."""
        now = time.monotonic()
        if not self.moves or now - self.last < 0.2:
            return
        self.last = now
        rest = "" if left is None else f", {left:.0f} s left"
        self._write(f"\r\x1b[K{self.name} {step}: {shown(told)}{rest}")

    def tell(self, evaluated: Mapping[str, Any]) -> None:
        self._clear()
        plain = {k: x for k, x in evaluated.items() if k not in ("kind", "step")}
        self._write(f"{self.name} {evaluated['step']}: {shown(plain)}\n")

    def _clear(self) -> None:
        if self.moves:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        if self.stream is not None:
            self.stream.write(text)
            self.stream.flush()


def shown(numbers: Mapping[str, Any]) -> str:
    """The numbers of a line, without those that are lists or tables."""
    plain = {k: x for k, x in numbers.items() if isinstance(x, (int, float)) and k != "seconds"}
    return ", ".join(
        f"{name.replace('_', ' ')} {x:,}"
        if isinstance(x, int)
        else f"{name.replace('_', ' ')} {x:.4g}"
        for name, x in plain.items()
    )
