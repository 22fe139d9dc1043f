"""Train the preset `tiny` on CPython's own topics and save it as a checkpoint: ``python
make_trained.py [FOLDER]``.

The tests of generation need a model whose next tokens can be guessed, neither always nor never.
Bytes are the tokens; 2,000 steps of 16 windows take about a minute and a half. The result depends
on the machine's rounding, so it is committed: tests/golden/trained, 42,262 parameters in bfloat16.
"""

from __future__ import annotations

import sys
from math import cos, pi
from pathlib import Path

import numpy as np

from refimpl.checkpoint import save_checkpoint
from refimpl.config import preset
from refimpl.model import backward, forward
from refimpl.optimizer import AdamW, Moments, clip_global_norm, update_gate_biases
from refimpl.parameters import init_parameters
from refimpl.text import load_text

STEPS = 2000
WARM_UP = 30
BATCH = 16
LENGTH = 48
PEAK = 0.01


def main(folder: Path) -> None:
    config = preset("tiny")
    data = np.frombuffer(load_text().data, np.uint8).astype(np.int64)
    rng = np.random.default_rng(0)
    params = init_parameters(config, std=0.12)
    optimizer, moments = AdamW(weight_decay=0.01), Moments()
    for step in range(STEPS):
        starts = rng.integers(0, len(data) - LENGTH, BATCH)
        output, saved = forward(params, data[starts[:, None] + np.arange(LENGTH + 1)], config)
        grads = backward(saved)
        clip_global_norm(grads, 1.0)
        learning_rate = (
            PEAK * min((step + 1) / WARM_UP, 1) * (0.02 + (1 + cos(pi * step / STEPS)) / 2)
        )
        moments = optimizer.update(params, grads, moments, learning_rate)
        gamma = 1e-3 if step < 0.9 * STEPS else 0.0
        update_gate_biases(params, output.loads, gamma, config)
        if step % 500 == 0 or step == STEPS - 1:
            print(step, float(output.main), *map(float, output.mtp), flush=True)
    save_checkpoint(params, config, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "trained")
