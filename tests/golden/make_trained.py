"""Pre-train the preset `tiny` on CPython's own topics by the stage of `refimpl train`, and save it
as a checkpoint: ``python make_trained.py [FOLDER]``.

The tests of generation need a model whose next tokens can be guessed, neither always nor never.
Bytes are the tokens; 2,000 steps of up to 16 windows take some minutes. The result depends on the
machine's rounding, so it is committed: tests/golden/trained, 42,262 parameters in bfloat16 (made by
a loop of this script's own, before there was the stage).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from refimpl.checkpoint import save_checkpoint
from refimpl.config import preset
from refimpl.parameters import EMBEDDING, HEAD
from refimpl.train.pretrain import Pretrain, PretrainSettings
from refimpl.train.run import Guard

SETTINGS: dict[str, Any] = {
    "preset": "tiny",
    "std": 0.12,
    "tokens": 1_500_000,
    "length": 48,
    "batch": 16,
    "learning_rate": 0.01,
    "warmup_steps": 30,
    "weight_decay": 0.01,
}


def main(folder: Path, **changed: Any) -> None:
    """Train, and write the model in bfloat16 into ``folder``. YaRN is there from the start.
    Documents end with a token of their own; the model that is saved knows the 256 bytes alone."""
    tiny, settings = preset("tiny"), PretrainSettings(**SETTINGS | changed)
    stage = Pretrain(settings, settings.machine())
    stage.config = replace(tiny, vocabulary=stage.config.vocabulary)
    state, guard = stage.start(), Guard(settings.jump, [])
    while stage.progress(state, {}) < 1:
        state, told = stage.step(state, guard)
        if state.step % 500 == 1 or stage.progress(state, {}) >= 1:
            print(state.step, told["main"], *told["mtp"], flush=True)
    rows = {name: state.params[name][: tiny.vocabulary] for name in (EMBEDDING, HEAD)}
    save_checkpoint(state.params | rows, tiny, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "trained")
