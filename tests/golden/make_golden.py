"""Golden values for every op and for the model, by formulas of their own and torch's autograd, in
float64.

Each op has a file of its own beside this one, with its formulas and its cases. Nothing there shares
code with ``refimpl.ops`` or ``refimpl.model.forward``: the equations are written again from the
papers, with loops over tokens, heads and experts where that is the plainest, and every gradient is
autograd's. So a mistake that our forward and backward have in common can't pass. torch is needed to
run this script alone:

    python tests/golden/make_golden.py [NAME ...] [--folder FOLDER]

It writes one safetensors file per op, those named or all, to refimpl/port/small, where they are
part of the conformance vectors; `refimpl vectors OUT` then makes their index, OUT/index.json, which
belongs there too. A tensor is called golden-OP-CASE/PREFIX/NAME, with the prefixes ``in``
(differentiable inputs), ``aux`` (integers, masks, constants), ``cot`` (random cotangents), ``out``
and ``grad``. The metadata has one entry, ``golden``: JSON with the script, torch's version and the
scalar settings of each case. Inputs of the model are rounded to float16 and stored so; everything
else that is real is float64.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path

import torch
from safetensors.numpy import save

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golden.case import Case

SMALL = Path(__file__).resolve().parents[2] / "refimpl" / "port" / "small"
SCRIPT = "tests/golden/make_golden.py"
FILES = (  # in reading order
    "linear",
    "embedding",
    "rms_norm",
    "swiglu",
    "ffn",
    "rope",
    "attention",
    "mla",
    "router",
    "balance_loss",
    "moe",
    "cross_entropy",
    "head_cross_entropy",
    "log_prob",
    "preference_loss",
    "grpo",
    "mtp",
    "model",
    "optimizer",
)


def write(stem: str, cases: Iterable[Case], folder: Path) -> None:
    """One safetensors file. Its metadata has a single key, so that the same values give the same
    bytes."""
    tensors, settings = {}, {}
    for case in cases:
        label = case.name.removeprefix(f"{stem}/")
        settings[label] = case.settings
        full = f"golden-{stem}-{label}"
        tensors |= {f"{full}/{name}": array for name, array in case.tensors.items()}
    golden = {"script": SCRIPT, "torch": torch.__version__.split("+")[0], "cases": settings}
    (folder / f"golden-{stem}.safetensors").write_bytes(
        save(tensors, metadata={"golden": json.dumps(golden)})
    )


def main(names: Sequence[str], folder: Path) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    for stem in names or FILES:
        write(stem, import_module(f"golden.{stem}").cases(), folder)
        print(f"{stem}: {(folder / f'golden-{stem}.safetensors').stat().st_size:,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write golden values.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="files to write, by default all")
    parser.add_argument("--folder", type=Path, default=SMALL)
    given = parser.parse_args()
    if unknown := sorted(set(given.names) - set(FILES)):
        parser.error(f"NAME must be one of {', '.join(FILES)}, got {', '.join(unknown)}")
    main(given.names, given.folder)
