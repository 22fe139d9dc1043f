"""The gradients of a model that need not fit into memory: parameters are read a layer and an expert
at a time, gradients are written as they are made, and an interrupted run resumes where it stopped.

The numbers are those of `model.forward` and `model.backward`, whose blocks are run here. Read
request.py (what to compute) and grpo.py (another loss), lazy.py (parameters read a piece at a
time), folder.py (files and records), steps.py (the work), cotangents.py (the gradients of
activations), result.py, and units.py with rounded.py (the unit of error of each tensor), in this
order.

A folder of results has safetensors under the checkpoint's own names, experts one by one:

    in.safetensors          in/tokens, in/targets, in/mask (the positions whose target counts),
                            in/key_mask, in/positions and in/segments if given; with GRPO in place
                            of in/mask in/grpo_mask, in/advantages, in/old_log_prob,
                            in/reference_log_prob
    logits.safetensors      out/logits [B, T, W]
    out.safetensors         out/loss_per_token [B, T] (0 where none counts; not with GRPO),
                            out/loss and its parts out/main, out/mtp.N, out/balance.L
    aux.safetensors         aux/routes.L and aux/weights.L [B, T, K], aux/load.L [E]; with a balance
                            loss also aux/counted.L; with GRPO aux/unclipped [B, T] (where the ratio
                            counts as it is) and aux/kept [B] (False: dropped as off-policy)
    act-….safetensors       act/ and the name of an activation, of `ACTIVATIONS` and, where the
                            pattern names them, of `INNER`; with GRPO act/log_prob [B, T]
    cot-….safetensors       cot/ and the same name: the whole gradient of the loss in every
                            activation. That of a layer's attention is that of after_attention,
                            since the one is added to the stream and makes the other; that of the
                            gate's scores has the part of the balance loss
    split-….safetensors     with a split, split/P/TERM/ and the parameter's name: the gradient of
                            part P's undivided sum of one term of the loss
    grad-….safetensors      grad/ and the parameter's name: a file per layer, then embedding, norm
                            and head
    index.json              written last: metadata, files (bytes, sha256) and tensors. Of a tensor
                            file, dtype, shape, scale (max |x|; null if that is not finite), and, if
                            they were asked for, its units by type; or same_as, the name under which
                            it is stored. metadata: format (1), kind ("model"), the versions of
                            refimpl and numpy, dtype, implementation, backend, config; checkpoint
                            (path, and fingerprint by `content_fingerprint`), request, units (types,
                            reruns, seed; null without), split (spec, ranks, and by term the parts'
                            sums, counts and each rule's factors; null without)
    unfinished/             a record per step that is done; removed when all are
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..checkpoint import Checkpoint
from ..checkpoint.files import content_fingerprint
from ..checkpoint.source import Source
from ..checkpoint.tensor_file import read_tensor_file
from ..config import CONVENTIONS
from ..files import held
from .folder import FORMAT, Folder, Size
from .grpo import GRPO
from .request import ACTIVATIONS, INNER, UNITS, Request, gradient_shapes
from .result import Result, result_of, split_of, write_result
from .shared import Found, SharedSteps, check_shared, shared_gradients
from .split import SPEC
from .steps import Steps, steps_to
from .units import measure_units, reruns_of, units_of

__all__ = [
    "ACTIVATIONS",
    "GRPO",
    "INNER",
    "SPEC",
    "UNITS",
    "Request",
    "Result",
    "Size",
    "check_shared",
    "gradient_shapes",
    "loss_and_grads",
    "shared_gradients",
    "write_gradients",
]


def write_gradients(
    source: Source,
    request: Request,
    folder: Path,
    *,
    checkpoint: str = "",
    origin: Path | None = None,
    force: bool = False,
    progress: Callable[[str, int, int], None] = lambda step, done, total: None,
    shared: Callable[[], Found | None] | None = None,
) -> Result:
    """Write what ``request`` asks of ``source`` to ``folder``, or the rest of it if a run of the
    same request was interrupted there.

    Args:
        checkpoint: what tells the source from others of the same config, for resuming.
        origin: the folder of the checkpoint, for the index.
        force: replace what another run left in the folder.
        progress: called with a step's name, how many are done, and how many there are.
        shared: what gives the numbers, where several ranks find them (`shared_gradients`).

    ValueError or TypeError, before anything is written, if the request does not fit the source; the
    message begins with the argument. CouldNotRun if the folder can't be used.
    """
    request.check(source)
    config = request.config(source.config)
    gradients, activations = request.gradients(config), request.activation_names(config)
    with held(folder):
        files = Folder(
            folder,
            request.fingerprint(source, checkpoint),
            force,
            gradients=gradients,
            activations=activations,
            dtype=source.dtype,
        )
        steps = Steps(source, request, files)
        if shared is not None and (found := shared()) is not None:
            steps = SharedSteps(source, request, files, found)
        order = steps_to(config, gradients, activations)
        order += [("split",)] if request.split else []
        reruns = reruns_of(request)
        total = len(order) * (1 + len(reruns))
        for number, step in enumerate(order):
            progress(" ".join(map(str, step)), number, total)
            files.do(step, steps.run)
        files.do(("result",), lambda _: write_result(steps))
        measure_units(steps, lambda name, done: progress(name, len(order) + done, total))
        progress("done", total, total)
        result = result_of(steps)
        files.finish(metadata_of(steps, origin), units_of(steps))
    return result


def metadata_of(steps: Steps, origin: Path | None) -> dict[str, Any]:
    """What the index says of the whole result."""
    request, checkpoint = steps.request, None
    if origin is not None:
        checkpoint = {"path": str(origin.absolute()), "fingerprint": content_fingerprint(origin)}
    units = {"types": list(request.units), "reruns": request.reruns, "seed": request.seed}
    return {
        "format": FORMAT,
        "kind": "model",
        "refimpl": __version__,
        "numpy": np.__version__,
        "dtype": str(steps.source.dtype),
        "implementation": request.implementation,
        "backend": request.backend,
        "config": asdict(steps.config),
        "checkpoint": checkpoint,
        "request": request.about(steps.config),
        "units": units if request.units else None,
        "split": split_of(steps),
    }


def loss_and_grads(
    folder: Path | str,
    tokens: np.ndarray,
    *,
    dtype: str = "float64",
    convention: str = "official",
    **options: Any,
) -> tuple[float | None, dict[str, np.ndarray]]:
    """The loss of a small checkpoint on ``tokens`` [B, T], and every parameter's gradient under the
    checkpoint's names, experts one by one: what ``refimpl grads`` writes, as arrays.

    Args:
        dtype: float64 or float32, to compute in. convention: a name of `CONVENTIONS`.
        options: fields of `Request`, such as ``mask``, ``mtp=True``, ``balance_alpha``,
            ``grpo=GRPO(…)``, ``only="*.self_attn.*"``.

    The loss is None with ``dlogits``. ValueError or TypeError for an option that does not fit;
    CouldNotRun for a checkpoint that can't be read.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention}")
    mtp = bool(options.get("mtp"))
    source = Checkpoint.open(folder, dtype=dtype, conventions=CONVENTIONS[convention], mtp=mtp)
    request = Request(np.asarray(tokens), **{"logits": False} | options)
    with tempfile.TemporaryDirectory(prefix="refimpl-") as place:
        result = write_gradients(source, request, Path(place))
        files = sorted(Path(place).glob("grad-*.safetensors"))
        found = {
            name: np.array(x) for file in files for name, x in read_tensor_file(file)[0].items()
        }
    return result.loss, {name: found[f"grad/{name}"] for name in result.gradients}
