"""The table of all ops, and the implementations of NumPy alone by the name that commands take."""

from __future__ import annotations

from .flash_attention import flash_attention_backward, flash_attention_forward
from .head_cross_entropy import head_cross_entropy_backward, head_cross_entropy_forward
from .leaves import Op
from .mla import mla_backward, mla_forward
from .mla_absorbed import mla_absorbed_backward, mla_absorbed_forward
from .moe import Networks, moe_backward, moe_forward
from .mtp import mtp_backward, mtp_forward

__all__ = ["IMPLEMENTATIONS", "REFERENCE", "Ops"]


class Ops(Networks):
    """Every op that the model looks up: the leaves, the network, and what is made of them."""

    label = "REFERENCE"
    mla = Op(mla_forward, mla_backward)
    moe = Op(moe_forward, moe_backward)
    head_cross_entropy = Op(head_cross_entropy_forward, head_cross_entropy_backward)
    mtp = Op(mtp_forward, mtp_backward)


REFERENCE = Ops()  # every op of this package

IMPLEMENTATIONS = {  # tables by the name that `--implementation` takes; each needs NumPy alone
    "reference": REFERENCE,
    "flash": REFERENCE | {"attention": Op(flash_attention_forward, flash_attention_backward)},
    "absorbed": REFERENCE | {"mla": Op(mla_absorbed_forward, mla_absorbed_backward)},
}
