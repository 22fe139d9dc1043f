"""How far emulated FP8 stands from float64, tensor by tensor, on a drawn model with more than one
tile: ``python benchmarks/fp8.py``.

Three columns, each the largest difference over the largest number of the exact gradient: FP8 from
float64; FP8 whose float32 results are moved a little by chance, as the reruns of `refimpl grads
--units` move them, from FP8; FP8 with sums of 14 bits, as Hopper's tensor cores add, from FP8. All
take the same experts. Below it, over all tensors, how far each planted mistake stands from FP8
(UE8M0 rounded down: from FP8 with scales in UE8M0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from refimpl.check.planted import PLANTED_IN_FP8, plant
from refimpl.config import preset
from refimpl.fp8 import Recipe, fp8_table
from refimpl.grads.rounded import nudged
from refimpl.grads.units import STEPS_IN_FP8
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
    moved = gradients(REFERENCE | {name: nudged(op, 1, STEPS_IN_FP8) for name, op in table.items()})
    cut = gradients(fp8_table(Recipe(bits=14)))
    print(f"{'gradient of':48} from float64  moved float32  14-bit sums")
    for name, g in wanted.items():
        if largest := np.max(np.abs(g), initial=0):
            pairs = ((found, wanted), (moved, found), (cut, found))
            errors = (np.max(np.abs(a[name] - b[name])) / largest for a, b in pairs)
            print(f"{name:48} " + "  ".join(f"{100 * error:11.1f} %" for error in errors))
    print(f"\n{'mistake':48}    smallest       median      largest")
    ue8m0 = Recipe(scale="ue8m0")
    of_ue8m0 = gradients(fp8_table(ue8m0))
    for bug in PLANTED_IN_FP8:
        module: Any = plant(bug)
        down = "UE8M0" in bug.name
        right, recipe = (of_ue8m0, ue8m0) if down else (found, Recipe())
        wrong = gradients(module.fp8_table(recipe))
        errors = [
            np.max(np.abs(wrong[name] - g)) / np.max(np.abs(g))
            for name, g in right.items()
            if g.any()
        ]
        told = (min(errors), np.median(errors), max(errors))
        print(f"{bug.name:48} " + "  ".join(f"{100 * error:9.3g} %" for error in told))


if __name__ == "__main__":
    main()
