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
from refimpl.ops import bias_update
from refimpl.optimizer import AdamW, clip_global_norm
from refimpl.parameters import BIAS, init_parameters
from refimpl.text import load_text

STEPS, WARM_UP, BATCH, LENGTH, PEAK = 2000, 30, 16, 48, 0.01


def main(folder: Path) -> None:
    config = preset("tiny")
    data = np.frombuffer(load_text().data, np.uint8).astype(np.int64)
    rng = np.random.default_rng(0)
    params = init_parameters(config, std=0.12)
    optimizer = AdamW(weight_decay=0.01)
    for step in range(STEPS):
        starts = rng.integers(0, len(data) - LENGTH, BATCH)
        output, saved = forward(params, data[starts[:, None] + np.arange(LENGTH + 1)], config)
        grads = backward(saved)
        clip_global_norm(grads, 1.0)
        learning_rate = (
            PEAK * min((step + 1) / WARM_UP, 1) * (0.02 + (1 + cos(pi * step / STEPS)) / 2)
        )
        optimizer.update(params, grads, learning_rate)
        for layer, load in output.loads.items():
            name = f"model.layers.{layer}.{BIAS}"
            params[name] = bias_update(params[name], load, 1e-3 if step < 0.9 * STEPS else 0.0)
        if step % 500 == 0 or step == STEPS - 1:
            print(step, float(output.main), *map(float, output.mtp), flush=True)
    save_checkpoint(params, config, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "trained")
