"""How far emulated FP8 stands from float64, tensor by tensor, on a drawn model with more than one
tile: ``python benchmarks/fp8.py``.

Three columns, each the largest difference over the largest number of the exact gradient: FP8 from
float64; FP8 whose float32 results are moved to their neighbours by chance, as sums in another order
move them, from FP8; FP8 with sums of 14 bits, as Hopper's tensor cores add, from FP8. All take the
same experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from refimpl.config import preset
from refimpl.fp8 import Recipe, fp8_table
from refimpl.grads.rounded import nudged
from refimpl.model import backward, forward
from refimpl.ops import REFERENCE, Ops
from refimpl.parameters import init_parameters

CONFIG = replace(
    preset("tiny"),
    width=160,
    layers=2,
    dense_layers=1,
    heads=2,
    q_latent=144,
    kv_latent=136,
    nope=64,
    rope=16,
    value=72,
    dense_hidden=272,
    expert_hidden=144,
    experts=4,
    groups=1,
    keep_groups=1,
    top_k=2,
    shared_experts=1,
    mtp_depth=0,
    norm_eps=1e-6,
)


def main() -> None:
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocabulary, (2, 80))
    params = init_parameters(CONFIG, std=0.08, dtype="float32")
    exact, exact_saved = forward(
        {name: x.astype(np.float64) for name, x in params.items()}, tokens, CONFIG
    )

    def gradients(table: Ops) -> Mapping[str, np.ndarray]:
        return backward(forward(params, tokens, CONFIG, ops=table, routes=exact.routes)[1])

    wanted, table = backward(exact_saved), fp8_table()
    found = gradients(table)
    moved = gradients(REFERENCE | {name: nudged(op, 1) for name, op in table.items()})
    cut = gradients(fp8_table(Recipe(bits=14)))
    print(f"{'gradient of':48} from float64  moved float32  14-bit sums")
    for name, g in wanted.items():
        if largest := np.max(np.abs(g), initial=0):
            pairs = ((found, wanted), (moved, found), (cut, found))
            errors = (np.max(np.abs(a[name] - b[name])) / largest for a, b in pairs)
            print(f"{name:48} " + "  ".join(f"{100 * error:11.1f} %" for error in errors))


if __name__ == "__main__":
    main()
