"""torch.optim.AdamW over a few steps."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from golden.case import Case


def cases() -> Iterable[Case]:
    """torch.optim.AdamW over six steps of clipped gradients, the learning rate changing at each."""
    settings = (
        ("v3", 0.9, 0.95, 1e-8, 0.1, 1.0),
        ("no_decay", 0.8, 0.99, 1e-3, 0.0, 3.0),
        ("loose", 0.9, 0.95, 1e-8, 0.5, 1e3),
    )
    for name, beta1, beta2, epsilon, weight_decay, max_norm in settings:
        case = Case(
            f"optimizer/{name}",
            beta1=beta1,
            beta2=beta2,
            epsilon=epsilon,
            weight_decay=weight_decay,
            max_norm=max_norm,
        )
        shapes, rates = {"a": (3, 4), "b": (5,)}, case.aux("rates", case.rng.uniform(1e-3, 1e-1, 6))
        params = {
            n: torch.nn.Parameter(case.aux(f"start.{n}", case.rng.standard_normal(s)))
            for n, s in shapes.items()
        }
        adam = torch.optim.AdamW(
            params.values(), betas=(beta1, beta2), eps=epsilon, weight_decay=weight_decay
        )
        norms = []
        for step, rate in enumerate(rates):
            for n, p in params.items():
                p.grad = case.aux(f"grad{step}.{n}", case.rng.standard_normal(shapes[n]))
            norms.append(torch.nn.utils.clip_grad_norm_(params.values(), max_norm))
            adam.param_groups[0]["lr"] = float(rate)
            adam.step()
        yield case.finish(
            norms=torch.stack(norms).detach(), **{n: p.detach() for n, p in params.items()}
        )
