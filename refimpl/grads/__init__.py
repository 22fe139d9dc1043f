"""Every gradient of a model that need not fit into memory: parameters come a layer and an expert at
a time, gradients leave as they are made, and a run that was killed goes on where it was.

The numbers are those of `model.forward` and `model.backward`, whose blocks are run here; three
things differ. Each block is run twice, first for its output and then, with its routes fixed, for
its backward. The ops `embedding` and `moe` of the table read rows and experts when they need them.
And the work is a list of steps, each of which reads what earlier ones left on disk and leaves a
record of its own: to resume is to skip the steps that have one.

In the folder, safetensors under the checkpoint's own names (experts one by one), and index.json,
written last:

    in.safetensors          in/tokens, in/targets, in/mask (the positions whose target counts),
    in/key_mask logits.safetensors      out/logits [B, T, W] out.safetensors
    out/loss_per_token [B, T] (0 where none counts), out/loss and its parts out/main, out/mtp.N,
                            out/balance.L
    aux.safetensors         aux/routes.L and aux/weights.L [B, T, K], aux/load.L [E]; aux/counted.L
    with a balance loss act-….safetensors       act/, the activations that were asked for: see
    ACTIVATIONS cot-….safetensors       cot/, the gradients of those among them that are layers'
    outputs, the embeddings or the
                            final hidden states: what a backward of one layer starts from, and ends
                                with
    grad-layer-….safetensors, grad-embedding, grad-norm, grad-head: grad/ and the parameter's name
    unfinished/             the records, until all is done
"""

from .folder import Size
from .pieces import EMBEDDING
from .request import ACTIVATIONS, Request, gradient_shapes
from .stream import Result, Stream

__all__ = ["ACTIVATIONS", "EMBEDDING", "Request", "Result", "Size", "Stream", "gradient_shapes"]
