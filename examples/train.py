"""Pre-train a small DeepSeek-V3 by hand-derived gradients, on the English text that CPython ships:
``python examples/train.py [STEPS]``.

Every line that computes is one call: a batch of windows, one step (forward, backward, clipping,
AdamW, the gates' biases), and from time to time the loss of text that it was not trained on.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from math import cos, pi
from time import perf_counter

from refimpl.config import preset
from refimpl.generate import generate
from refimpl.optimizer import AdamW, Moments
from refimpl.train.documents import documents, held_out
from refimpl.train.losses import bigram_loss, held_out_loss
from refimpl.train.machine import open_machine
from refimpl.train.packing import Windows
from refimpl.train.step import State, max_violation, train_step
from refimpl.train.vocabulary import make_vocabulary


def main(steps: int = 150, rows: int = 32, length: int = 32, peak: float = 4e-3) -> float:
    """The loss of held-out text after so many steps of ``rows`` windows of ``length`` bytes."""
    machine, vocabulary = open_machine(), make_vocabulary()
    config = replace(preset("mini"), yarn=None, max_positions=2 * length)
    train, test = (
        Windows([vocabulary.encode(text) for text in texts], length, end=vocabulary.end)
        for texts in held_out(documents())
    )
    print(f"a bigram model: {bigram_loss(train, test, vocabulary.size):.3f} nats per byte")
    state = State(machine.parameters(config, seed=0, std=0.06), Moments())
    optimizer, begin = AdamW(weight_decay=0.1), perf_counter()
    while state.step < steps:
        batch = train.batch(state.position, rows, seed=0)
        rate = peak * min((state.step + 1) / 20, (1.1 + cos(pi * state.step / steps)) / 2)
        state, told = train_step(
            state, batch.arrays(), config, machine, optimizer, learning_rate=rate
        )
        if state.step % 50 == 0 or state.step == steps:
            loss = held_out_loss(state.params, test, config, machine)
            fullest = max(max_violation(load) for load in told.loads.values())
            speed = state.tokens / (perf_counter() - begin)
            print(
                f"step {state.step}: loss {told.main:.3f}, MTP {told.mtp[0]:.3f}, held out "
                f"{loss:.3f}, fullest expert {fullest:+.0%}, {speed:,.0f} bytes/s"
            )
    (said,) = generate(state.params, config, [vocabulary.encode("The value ")], max_tokens=length)
    print(f"The value {vocabulary.decode(said.tokens)!r}")
    return loss


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
