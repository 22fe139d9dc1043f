"""Hugging Face's DeepSeek models as an oracle: tiny random ones, truly in float64, and their
gradients by autograd.

transformers in float64 is not float64: norms, gate, rotary angles, eager softmax and loss are cast
to float32 on the way. Inside `float64` they are not, and `NarrowNumbers` records what still is.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
)
from transformers import modeling_rope_utils as rope_utils
from transformers.modeling_layers import MtpModel
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as v32
from transformers.models.glm4_moe_lite import modeling_glm4_moe_lite as glm4
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as dsa

from golden.checkpoint_values import Arrays, Values

FAMILIES = {
    "v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    "v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "glm4": (Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM),
    "v32": (DeepseekV32Config, DeepseekV32ForCausalLM),
    "dsa": (GlmMoeDsaConfig, GlmMoeDsaForCausalLM),
}
NARROW = (torch.float32, torch.float16, torch.bfloat16, torch.complex64)

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)


class WideTorch:
    """``torch``, but that its float32 is float64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def float64() -> Iterator[None]:
    """Inside, transformers casts to float64 instead of float32. Build the model inside, too: it
    makes frequencies."""
    with ExitStack() as stack:
        for module in (v2, v3, v32, glm4, dsa, rope_utils):
            stack.enter_context(mock.patch.object(module, "torch", WideTorch()))
        # as a cast would, this makes a copy without gaps: V2 views pairs of it as complex numbers
        stack.enter_context(
            mock.patch.object(torch.Tensor, "float", lambda tensor: tensor.double().contiguous())
        )
        yield


class NarrowNumbers(TorchDispatchMode):
    """Records every torch operation, of forward and backward, that made numbers narrower than
    float64."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(
            isinstance(leaf, torch.Tensor) and leaf.dtype in NARROW for leaf in tree_leaves(out)
        ):
            self.seen.add(str(func))
        return out


def build(
    family: str,
    settings: dict[str, Any],
    seed: int,
    folder: Path | None = None,
    *,
    attention: str = "eager",
    experts: str = "eager",
) -> Any:
    """A model with random parameters, all off their neutral values and gate biases of both signs.

    It is saved to ``folder`` in float32 and returned in float64: both hold the same numbers.
    """
    config_class, model_class = FAMILIES[family]
    config = config_class(**settings)
    config._attn_implementation, config._experts_implementation = attention, experts
    with no_shared_experts_allowed():
        model = model_class(config)
    for tensor in drawn_tensors(model).values():
        tensor.data = tensor.data.to(torch.float32)  # of gates `float64` makes them float64
    randomise(model, seed)
    if folder is not None:
        model.save_pretrained(folder)
    return model.double()


def build_mtp(model: Any, depth: int, seed: int) -> Any:
    """transformers' MTP modules for the model, which keeps its parameters; theirs are random, in
    float64."""
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with no_shared_experts_allowed():
        modules = MtpModel(model, depth).double()
    randomise(modules, seed)
    model.load_state_dict(own)  # embedding and head are shared
    return modules


@contextmanager
def no_shared_experts_allowed() -> Iterator[None]:
    """Without shared experts transformers makes three matrices without numbers, and torch warns of
    them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors", UserWarning)
        yield


def load(family: str, folder: Path, dtype: str) -> Any:
    """What transformers reads from the folder, all of it and nothing else, in the type
    ``dtype``."""
    with no_shared_experts_allowed():
        model, told = FAMILIES[family][1].from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            experts_implementation="eager",
        )
    assert not any(told.values()), told
    return model


def drawn_tensors(model: Any) -> dict[str, Any]:
    """Every parameter, then every gate bias, by name."""
    buffers = model.named_buffers()
    biases = {name: b for name, b in buffers if name.endswith("e_score_correction_bias")}
    return dict(model.named_parameters()) | biases


def randomise(model: Any, seed: int) -> None:
    """Draw every parameter and every gate bias anew."""
    rng = np.random.default_rng(seed)
    for name, parameter in drawn_tensors(model).items():
        drawn = rng.standard_normal(tuple(parameter.shape))
        if name.endswith("bias"):
            drawn = 0.4 * drawn - 0.5  # a score is in 0…1, so the biased score is often negative
        elif "norm" in name:
            drawn = 1 + 0.3 * drawn
        elif "embed" not in name:
            drawn = (
                drawn * (2.0 if name.endswith("gate.weight") else 1.2) / parameter.shape[-1] ** 0.5
            )
        with torch.no_grad():
            parameter.copy_(torch.tensor(drawn))


def our_names(tensors: dict[str, Any], expert_hidden: int) -> Arrays:
    """Tensors under Hugging Face's names in memory, under ours: ``gate_up_proj`` is two tensors."""
    ours: Arrays = {}
    for name, tensor in tensors.items():
        array = tensor.detach().numpy()
        if name.endswith("experts.gate_up_proj"):
            ours[name.replace("gate_up_proj", "gate_proj.weight")] = array[:, :expert_hidden]
            ours[name.replace("gate_up_proj", "up_proj.weight")] = array[:, expert_hidden:]
        else:
            ours[name + (".weight" if name.endswith("experts.down_proj") else "")] = array
    return {
        name: array for name, array in ours.items() if array.size
    }  # no shared experts: arrays without numbers


def gradients(model: Any) -> Arrays:
    """What autograd left in the parameters, under our names; zeros where nothing came."""
    grads = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()
    }
    return our_names(grads, model.config.moe_intermediate_size)


def their_values(
    model: Any, tokens: np.ndarray, labels: np.ndarray, **inputs: np.ndarray | None
) -> Values:
    """Logits, loss and gradients; ``labels`` [B, T] are the tokens, −100 where one is no target."""
    model.zero_grad()
    given = {name: torch.tensor(array) for name, array in inputs.items() if array is not None}
    output = model(torch.tensor(tokens), labels=torch.tensor(labels), use_cache=False, **given)
    output.loss.backward()
    return Values(output.logits.detach().double().numpy(), output.loss.item(), gradients(model))


class Routing:
    """What the gates of a model did in one forward, by hooks: logits [M, E] and indices [M, K] of
    each MoE layer."""

    def __init__(self, model: Any) -> None:
        self.gates = [
            (n, m) for n, m in model.named_modules() if type(m).__name__.endswith("TopkRouter")
        ]
        self.logits: dict[str, Any] = {}
        self.indices: dict[str, Any] = {}
        for name, gate in self.gates:
            gate.register_forward_hook(lambda _, __, out, name=name: self._keep(name, out))

    def _keep(self, name: str, out: Any) -> None:
        self.logits[name], _, self.indices[name] = out

    def margin(self) -> float:
        """By how much the closest choice, of a group or of an expert, was decided in the last
        forward."""
        least = float("inf")
        for name, gate in self.gates:
            logits = self.logits[name].detach().double()
            biased = scores = logits.sigmoid() if self._is_v3(gate) else logits.softmax(-1)
            least = min(least, gap(scores, gate.top_k))  # what the balance loss counts
            if self._is_v3(gate):
                biased = scores + gate.e_score_correction_bias
            if self._is_v3(gate) or gate.topk_method == "group_limited_greedy":
                grouped = biased.view(len(biased), gate.num_group, -1)
                best = grouped.topk(2)[0].sum(-1) if self._is_v3(gate) else grouped.max(-1).values
                least = min(least, gap(best, gate.topk_group))
                kept = torch.zeros_like(best).scatter_(1, best.topk(gate.topk_group)[1], 1).bool()
                biased = grouped.masked_fill(~kept[..., None], -np.inf).flatten(1)
            least = min(least, gap(biased, gate.top_k))
        return least

    @staticmethod
    def _is_v3(gate: Any) -> bool:
        """Or another model with V3's gate."""
        return hasattr(gate, "e_score_correction_bias")


def gap(scores: Any, keep: int) -> float:
    """By how much the ``keep`` best of each row of scores [M, E] beat the rest, at the closest."""
    ordered = scores.sort(descending=True).values
    return (
        float((ordered[:, keep - 1] - ordered[:, keep]).min())
        if keep < ordered.shape[1]
        else float("inf")
    )
