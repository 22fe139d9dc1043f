"""Three tiny checkpoints of other model types, each with what transformers computes on it in
float64.

    python tests/golden/make_model_types.py INPUTS [FOLDER]      (needs the extra oracle; by default
    tests/golden/model_types)

INPUTS holds kimi_k2-tiny, glm4_moe_lite-tiny and fused-experts-tiny: config.json, tokens.npy and
model.safetensors with random weights, as transformers 5.24 saved them. Their weights are rounded to
bfloat16 here, which halves them. Beside them, outputs.safetensors, all with transformers' casts to
float32 patched (tests/oracle/hugging_face.py): out/loss, out/loss_per_token [B, T − 1], out/logits
and grad/NAME under our names as `sketch` makes them, out/greedy [B, N] (the N tokens that it
chooses next), and aux/parameters, their number.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import ml_dtypes
import numpy as np
import torch
from safetensors.numpy import load_file, save_file

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 2)]

from golden.checkpoint_values import SMALLEST_GAP, sketch
from oracle.hugging_face import NarrowNumbers, Routing, float64, load, their_values

FAMILIES = {"kimi_k2": "v3", "glm4_moe_lite": "glm4", "fused-experts": "v3"}
NEXT = 8  # tokens generated


def make(name: str, source: Path, folder: Path) -> None:
    """Write the checkpoint called ``name`` to the folder, and its outputs."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "tokens.npy"):
        shutil.copyfile(source / file, folder / file)
    rounded = {
        name: x if "bias" in name else x.astype(ml_dtypes.bfloat16)
        for name, x in load_file(source / "model.safetensors").items()
    }
    save_file(rounded, folder / "model.safetensors", {"format": "pt"})
    tokens = np.load(folder / "tokens.npy")
    with TemporaryDirectory() as work, float64():
        copy = Path(work)
        config = json.loads((folder / "config.json").read_text())
        if name == "kimi_k2":  # transformers has no name of its own for it
            config["model_type"] = "deepseek_v3"
        (copy / "config.json").write_text(json.dumps(config))
        shutil.copyfile(folder / "model.safetensors", copy / "model.safetensors")
        model = load(FAMILIES[name], copy, "float32").double()
        model.set_attn_implementation("eager")
        routing = Routing(model)
        with NarrowNumbers() as narrow:
            values = their_values(model, tokens, tokens)
        margins = [routing.margin()]
        targets = torch.tensor(tokens[:, 1:])
        logits = torch.tensor(values.logits)
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), targets, reduction="none"
        )
        ids = torch.tensor(tokens)
        for _ in range(NEXT):
            with torch.no_grad():
                last = model(ids, use_cache=False).logits[:, -1]
            margins.append(routing.margin())
            best = last.topk(2).values
            margins.append(float((best[:, 0] - best[:, 1]).min()))
            ids = torch.cat([ids, last.argmax(-1, keepdim=True)], dim=1)
    if narrow.seen or min(margins) < SMALLEST_GAP:
        raise SystemExit(
            f"{name}: float32 in {narrow.seen or 'nothing'}, closest choice {min(margins):.1e}"
        )
    outputs = {
        "out/loss": np.asarray(values.loss),
        "out/loss_per_token": losses.numpy(),
        "out/logits": sketch(values.logits),
        "out/greedy": ids[:, tokens.shape[1] :].numpy().copy(),
        "aux/parameters": np.asarray(model.num_parameters()),
    }
    outputs |= {f"grad/{name}": sketch(gradient) for name, gradient in values.grads.items()}
    save_file(outputs, folder / "outputs.safetensors")
    for path in folder.iterdir():
        path.chmod(0o644)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{name}: loss {values.loss:.8f}, closest choice {min(margins):.1e}, {size:,} bytes")


if __name__ == "__main__":
    root = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent / "model_types"
    for name in FAMILIES:
        make(name, Path(sys.argv[1]) / f"{name}-tiny", root / name)
