"""`make digests`: the bits of loss, hidden states and every gradient, for whoever rearranges the
core.

Five configurations run on fixed tokens and parameters, forward and backward, and each tensor's
bytes are hashed. BLAS decides bits, so no digest is committed: ``--against REV`` runs the same on
the package of that commit, on this machine, and names every tensor that differs (exit code 1).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]


def digests() -> dict[str, dict[str, str]]:
    """By configuration and tensor, the beginning of the SHA-256 of type, shape and bytes."""
    from refimpl.config import preset
    from refimpl.model import backward, forward

    try:
        from refimpl.parameters import parameter_shapes
    except ImportError:  # where it stood before that file was there
        from refimpl.model import parameter_shapes

    tiny = preset("tiny")
    raw = replace(tiny.conventions, mtp_hidden="raw")
    configs = {
        "tiny": tiny,
        "MTP depth 1": replace(tiny, mtp_depth=1),
        "MTP depth 0": replace(tiny, mtp_depth=0),
        "no query latent": replace(tiny, q_latent=None),
        "raw MTP state": replace(tiny, conventions=raw),
    }
    found = {}
    for title, config in configs.items():
        rng = np.random.default_rng(7)
        params = {
            name: rng.normal(1 if "norm.weight" in name else 0, 0.15, shape)
            for name, shape in parameter_shapes(config).items()
        }
        tokens = rng.integers(0, config.vocabulary, (2, 14))
        key_mask = np.arange(14) >= np.array([[0], [3]])
        output, saved = forward(params, tokens, config, key_mask=key_mask)
        tensors = {"loss": np.asarray(output.loss), "hidden": output.hidden, **backward(saved)}
        found[title] = {name: digest(x) for name, x in tensors.items()}
    return found


def digest(x: np.ndarray) -> str:
    hashed = hashlib.sha256(f"{x.dtype}{x.shape}".encode())
    hashed.update(np.ascontiguousarray(x).tobytes())
    return hashed.hexdigest()[:16]


def digests_of(revision: str) -> dict[str, dict[str, str]]:
    """Those of the package as it stood in a commit, in a process of its own."""
    command = ["git", "-C", str(ROOT), "archive", revision, "refimpl"]
    archive = subprocess.run(command, check=True, capture_output=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        environment = os.environ | {"PYTHONPATH": folder}
        done = subprocess.run(
            [sys.executable, __file__, "--json"],
            check=True,
            capture_output=True,
            env=environment,
            text=True,
        )
    return json.loads(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", metavar="REV", help="a commit to compare with")
    parser.add_argument("--json", action="store_true", help="print all of them as JSON")
    options = parser.parse_args()
    ours = digests()
    if options.json:
        print(json.dumps(ours))
        return 0
    theirs = digests_of(options.against) if options.against else ours
    differing = 0
    for title, tensors in ours.items():
        whole = hashlib.sha256("".join(tensors.values()).encode()).hexdigest()[:16]
        other = [
            name
            for name in tensors.keys() | theirs[title].keys()
            if tensors.get(name) != theirs[title].get(name)
        ]
        verdict = ""
        if options.against:
            verdict = (
                f"DIFFER: {', '.join(sorted(other))}"
                if other
                else f"the same bits as {options.against}"
            )
        differing += len(other)
        print(
            f"{title:<16} loss {tensors['loss']}  hidden {tensors['hidden']}  "
            f"{len(tensors) - 2} gradients, all {whole}  {verdict}"
        )
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
