"""DeepSeek-V3's schedules (2412.19437, section 4.2) scaled down to a run of any length.

Every stretch of V3's 14.8T tokens keeps its share: the learning rate is constant for 10T, falls as
a cosine over 4.3T, and has two low constants at the end; the batch grows over the first 469B; the
gates' biases move until 14.3T; λ falls from 0.3 to 0.1 at 10T.
"""

from __future__ import annotations

from dataclasses import replace
from math import cos, pi

from ..optimizer import V3_SCHEDULE, Schedule

__all__ = ["V3_TOKENS", "decayed", "scaled"]

V3_TOKENS = 14.8e12  # of V3's pre-training
FIRST_BATCH = V3_SCHEDULE.first_batch / V3_SCHEDULE.full_batch  # a fifth


def scaled(
    tokens: int, *, peak: float, batch: int, warmup_steps: int, bias_speed: float = 1e-3
) -> Schedule:
    """V3's schedule over ``tokens`` instead of 14.8T, up to ``peak`` instead of 2.2e-4 and
    ``batch`` sequences instead of 15,360."""
    share, v3 = tokens / V3_TOKENS, V3_SCHEDULE
    rate = peak / v3.peak
    return replace(
        v3,
        peak=peak,
        warmup_steps=warmup_steps,
        constant_until=v3.constant_until * share,
        decay_tokens=v3.decay_tokens * share,
        low=v3.low * rate,
        low_tokens=v3.low_tokens * share,
        last=v3.last * rate,
        first_batch=max(1, round(batch * FIRST_BATCH)),
        full_batch=batch,
        ramp_tokens=v3.ramp_tokens * share,
        bias_until=v3.bias_until * share,
        bias_speed=bias_speed,
        mtp_until=v3.mtp_until * share,
    )


def decayed(step: int, steps: int, peak: float, *, warmup: int, end: float = 0.1) -> float:
    """The learning rate of a fine-tuning step: linear up over ``warmup`` steps, then a cosine from
    ``peak`` to ``end`` · peak at the last.

    >>> [round(decayed(step, 100, 1.0, warmup=10), 2) for step in (0, 9, 99)]
    [0.1, 1.0, 0.1]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = 1.0 if step >= steps - 1 else (step - warmup) / (steps - 1 - warmup)
    return peak * (end + (1 - end) * (1 + cos(pi * done)) / 2)
