"""The embedding, as a product with one-hot vectors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from golden.case import Case


def embedding(w: Tensor, ids: Tensor) -> Tensor:
    """The row of each id, as a product with one-hot vectors."""
    return torch.einsum("...w,wd->...d", F.one_hot(ids, w.shape[0]).to(w.dtype), w)


def cases() -> Iterable[Case]:
    case = Case("embedding/repeated")
    yield case.finish(
        y=embedding(case.input("w", 7, 5), case.aux("ids", [[3, 0, 3, 6], [3, 1, 6, 6]]))
    )
    case = Case("embedding/flat")
    yield case.finish(y=embedding(case.input("w", 4, 3), case.aux("ids", [2, 2, 2])))
