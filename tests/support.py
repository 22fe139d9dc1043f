"""What tests of several folders share: hypothesis's draws for `refimpl.check.cases` and the
property test of every op, the command line in this process or in its own, a small tokenizer."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from refimpl.check import Report, check
from refimpl.check.cases import CASES, REGIMES, Case, RandomDraw, pair_of
from refimpl.cli import main

ROOT = Path(__file__).parents[1]
FULL = os.environ.get("REFIMPL_TEST_FULL") == "1"
EXAMPLES = 500 if FULL else 60  # of each op's property test
MOST_EXAMPLES = 1000  # drawn, not checked, in search of a regime that those miss
PACKAGE = ROOT / "refimpl"
NO_OPS = {"__init__", "choices", "leaves", "reference"}  # files of refimpl/ops/ that are no op
STEMS = sorted({path.stem for path in (PACKAGE / "ops").glob("*.py")} - NO_OPS)
# pages that derive no op
NOT_OPS = {
    *(
        "README",
        "checkpoints",
        "conventions",
        "fp8",
        "generation",
        "glossary",
        "parallel",
        "porting",
    ),
    *("proofs", "recipe", "splits", "vectors"),
}
DIGITS = 50  # of the exact arithmetic; 40 must agree

settings.register_profile(
    "refimpl",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=500 if FULL else 100,
    phases=[phase for phase in Phase if FULL or phase is not Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("refimpl")


class HypothesisDraw:
    """Shapes and flags from hypothesis, which shrinks them; arrays from a drawn seed."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.seed = data.draw(st.integers(0, 2**32 - 1), label="seed")
        self.rng = np.random.default_rng(self.seed)

    def integer(self, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high))

    def choice(self, options: Sequence[Any]) -> Any:
        return options[self.data.draw(st.integers(0, len(options) - 1))]

    def tokens(self, shape: tuple[int, ...], vocabulary: int) -> np.ndarray:
        return self.rng.integers(0, vocabulary, shape)


def property_test(op: str) -> Report:
    """Check the op on EXAMPLES drawn cases, every fourth to 50 digits, and on one more for each
    regime that these miss; no failure and no regime missed.

    Returns the report of the worst that was seen.
    """
    forward, backward = pair_of(op)
    missed = set(REGIMES[op])
    worst = Report([])
    count = 0

    def examine(case: Case, seed: int) -> None:
        report = check(
            forward,
            backward,
            case.inputs,
            case.kwargs,
            op=op,
            replay=case.replay,
            seed=seed,
            digits=DIGITS if seed % 4 == 0 else None,
        )
        assert report.ok, f"{case.kwargs}\n{report}"
        missed.difference_update(case.regimes)
        worst.merge(report)

    @settings(max_examples=EXAMPLES)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        nonlocal count
        draw = HypothesisDraw(data)
        examine(CASES[op](draw), draw.seed)
        count += 1

    run()
    assert count >= EXAMPLES
    for seed in range(MOST_EXAMPLES):
        if missed and missed & (case := CASES[op](RandomDraw(seed))).regimes:
            examine(case, seed)
    assert not missed, f"regimes never drawn: {missed}"
    assert all(t.difference is not None and t.difference <= 1e-8 for t in worst.tensors)
    assert all(t.digits is not None and t.digits >= 40 for t in worst.tensors), str(worst)
    return worst


class Done(NamedTuple):
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str


def refimpl_here(*arguments: object, cwd: Path | None = None) -> Done:
    """``refimpl ARGUMENTS`` in this process, which saves the start of another."""
    out = io.StringIO()
    err = io.StringIO()
    code = 0
    given = mock.patch.object(sys, "argv", ["refimpl", *map(str, arguments)])
    with chdir(cwd or "."), redirect_stdout(out), redirect_stderr(err), given:
        try:
            main()
        except SystemExit as left:
            code = int(left.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def refimpl_process(*arguments: object, **options: Any) -> Done:
    """``refimpl ARGUMENTS`` in a process of its own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "refimpl", *map(str, arguments)]
    done = subprocess.run(command, check=False, **pipes | options)
    return Done(done.returncode, done.stdout, done.stderr)


def byte_level(folder: Path) -> list[str]:
    """A tokenizer.json whose tokens are the 256 bytes and a first token <s>; the names of the
    bytes."""
    tokenizers = pytest.importorskip("tokenizers")
    names = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({name: i for i, name in enumerate(names)}, [])
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>"])
    made.save(str(folder / "tokenizer.json"))
    return names
