"""Pre-train the preset `tiny` on CPython's own topics, by the stage that `refimpl train` runs, and
save it as a checkpoint: ``python make_trained.py [FOLDER]``.

The tests of generation need a model whose next tokens can be guessed, neither always nor never.
Bytes are the tokens; about 2,000 steps of 16 windows take two minutes. The result depends on the
machine's rounding, so it is committed: tests/golden/trained, 42,262 parameters in bfloat16. (That
one was trained in 2,000 steps by a script of its own, before there was the stage.)
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from refimpl.checkpoint import save_checkpoint
from refimpl.config import preset
from refimpl.parameters import EMBEDDING, HEAD
from refimpl.train.pretrain import PretrainSettings
from refimpl.train.stage import begin_from
from refimpl.train.stages import run_stage

SETTINGS: dict[str, Any] = {
    "preset": "tiny",
    "std": 0.12,
    "tokens": 1_500_000,
    "length": 48,
    "batch": 16,
    "learning_rate": 0.01,
    "warmup_steps": 30,
    "weight_decay": 0.01,
    "evaluate_every": 500,
}


def main(folder: Path, **changed: Any) -> None:
    """Train, and write the model in bfloat16 into ``folder``. Documents end with a token of their
    own while training; the model that is saved knows the 256 bytes alone."""
    tiny = preset("tiny")
    model = {"yarn": tiny.yarn, "max_positions": tiny.max_positions}
    given = PretrainSettings(**SETTINGS | {"model": model} | changed)
    with TemporaryDirectory() as run:
        run_stage("train", Path(run), given)
        begin = begin_from(run, given.machine())
    rows = {name: begin.params[name][: tiny.vocabulary] for name in (EMBEDDING, HEAD)}
    if folder.exists():
        shutil.rmtree(folder)
    config = replace(begin.config, vocabulary=tiny.vocabulary)
    save_checkpoint(begin.params | rows, config, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "trained")
