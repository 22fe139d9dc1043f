"""The gradients of a model that need not fit into memory: parameters are read a layer and an expert
at a time, gradients are written as they are made, and an interrupted run resumes where it stopped.

The numbers are those of `model.forward` and `model.backward`, whose blocks are run here. Read
request.py (what to compute), lazy.py (parameters read a piece at a time), folder.py (files and
records), steps.py (the work) and result.py, in this order.

A folder of results has safetensors under the checkpoint's own names, experts one by one:

    in.safetensors          in/tokens, in/targets, in/mask (the positions whose target counts),
                            in/key_mask
    logits.safetensors      out/logits [B, T, W]
    out.safetensors         out/loss_per_token [B, T] (0 where none counts), out/loss and its parts
                            out/main, out/mtp.N, out/balance.L
    aux.safetensors         aux/routes.L and aux/weights.L [B, T, K], aux/load.L [E]; with a balance
                            loss also aux/counted.L
    act-….safetensors       act/ and the name of an activation, of `ACTIVATIONS`
    cot-….safetensors       cot/ and the name: the gradients of the embeddings, of the layers'
                            outputs and of the final hidden states, if they are among the
                            activations that were asked for. The backward of a layer alone starts
                            from one and ends with another
    grad-….safetensors      grad/ and the parameter's name: a file per layer, then embedding, norm
                            and head
    index.json              the file, shape and type of every tensor; written last
    unfinished/             a record per step that is done; removed when all are
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from .. import __version__
from ..checkpoint.source import Source
from .folder import Folder, Size, held
from .request import ACTIVATIONS, Request, gradient_shapes
from .result import Result, write_result
from .steps import Steps, steps_to

__all__ = ["ACTIVATIONS", "Request", "Result", "Size", "gradient_shapes", "write_gradients"]


def write_gradients(
    source: Source,
    request: Request,
    folder: Path,
    *,
    checkpoint: str = "",
    force: bool = False,
    progress: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> Result:
    """Write what ``request`` asks of ``source`` to ``folder``, or the rest of it if a run of the
    same request was interrupted there.

    Args:
        checkpoint: what tells the source from others of the same config, for resuming.
        force: replace what another run left in the folder.
        progress: called with a step's name, how many are done, and how many there are.

    ValueError or TypeError, before anything is written, if the request does not fit the source; the
    message begins with the argument. CouldNotRun if the folder can't be used.
    """
    request.check(source)
    config = request.config(source.config)
    gradients = request.gradients(config)
    with held(folder):
        files = Folder(
            folder,
            request.fingerprint(source, checkpoint),
            force,
            gradients=gradients,
            activations=request.activation_names(config),
            dtype=source.dtype,
        )
        steps, order = Steps(source, request, files), steps_to(config, gradients)
        for number, step in enumerate(order):
            progress(" ".join(map(str, step)), number, len(order))
            files.do(step, steps.run)
        progress("done", len(order), len(order))
        result = write_result(steps)
        about = {"dtype": str(source.dtype), "implementation": request.implementation}
        files.finish({"refimpl": __version__, **about, "config": asdict(config)})
    return result
