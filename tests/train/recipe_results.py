"""Results of a recipe in which every claim holds by a little, made up; and their schema, which real
ones must meet too."""

from __future__ import annotations

from math import log
from typing import Any

from refimpl.train.claims import judge
from refimpl.train.recipe import JOBS

__all__ = ["SCHEMA", "example"]

RIGHT = {  # greedy and sampled
    "sft": (0.60, 0.45),
    "grpo-0": (0.80, 0.70),
    "grpo-1": (0.76, 0.61),
    "grpo-2": (0.85, 0.75),
    "permuted": (0.10, 0.05),
    "one-update": (0.75, 0.65),
    "continued": (0.91, 0.85),
    "sft-hard": (0.50, 0.40),
    "grpo-hard": (0.70, 0.56),
    "second-sft": (0.80, 0.70),
    "last": (0.79, 0.70),
    "distilled": (0.55, 0.50),
    "student-gold": (0.69, 0.60),
    "student-answers": (0.33, 0.30),
    "student-grpo": (0.01, 0.01),
}
STEPS = [10, 20, 30, 40]
NUMBER = {"type": "number"}
LIST = {"type": "array", "items": {"type": ["number", "null"]}}
SHARE = {"type": "number", "minimum": 0, "maximum": 1}
MEASURED = {
    "type": "object",
    "required": ["problems", "accuracy", "low", "high", "format", "tokens"],
    "properties": dict.fromkeys(("accuracy", "low", "high", "format"), SHARE)
    | {"problems": {"type": "integer", "minimum": 1}, "tokens": NUMBER},
    "additionalProperties": False,
}
BOTH = dict.fromkeys(("greedy", "sampled"), MEASURED)
RUN: dict[str, Any] = {
    "steps": {"type": "integer"},
    "tokens": {"type": "integer"},
    "tokens_per_second": {"type": "integer"},
    "begin": {"type": "object", "additionalProperties": NUMBER},
    "end": {"type": "object", "additionalProperties": NUMBER},
    "curves": {"type": "object", "additionalProperties": LIST, "required": ["step", "loss"]},
    "loads": {"type": "object", "required": ["step"]},
    "evaluations": {"type": "object", "additionalProperties": LIST, "required": ["step"]},
    "positions": {"type": "object", "required": ["last"]},
    "samples": {"type": "object", "required": ["last"]},
    "lengths": {"type": "object", "required": ["original", "reached"]},
}
JOB: dict[str, Any] = {
    "type": "object",
    "required": [
        "stage",
        "inputs",
        "settings",
        "steps",
        "tokens",
        "curves",
        "evaluations",
        "seconds",
        "commits",
        "tokens_per_second",
    ],
    "properties": RUN
    | {
        "stage": {"type": "string"},
        "inputs": {"type": "object", "additionalProperties": {"type": "string"}},
        "settings": {"type": "object"},
        "seconds": NUMBER,
        "commits": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        "phases": {"type": "array", "items": {"type": "object", "properties": RUN}},
        "held_out": {
            "type": "object",
            "additionalProperties": {"type": "object", "properties": BOTH, "required": [*BOTH]},
        },
    },
    "additionalProperties": False,
}
MACHINE = ("processor", "cores", "backend", "implementation", "dtype", "Python", "NumPy", "BLAS")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": [
        "schema",
        "date",
        "commit",
        "machine",
        "toy",
        "seconds",
        "bigram",
        "jobs",
        "claims",
    ],
    "properties": {
        "schema": {"const": 1},
        "date": {"type": "string", "pattern": r"^\d{4}-\d\d-\d\d$"},
        "machine": {"type": "object", "required": [*MACHINE, "workers"]},
        "toy": {"type": "boolean"},
        "seconds": {"type": "number", "minimum": 0},
        "bigram": {"type": ["number", "null"]},
        "jobs": {"type": "object", "additionalProperties": JOB},
        "claims": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "values", "bound", "holds"],
                "properties": {
                    "values": {"type": "object", "additionalProperties": NUMBER},
                    "holds": {"type": ["boolean", "null"]},
                },
            },
        },
    },
}


def example() -> dict[str, Any]:
    """Of all jobs."""
    results: dict[str, Any] = {
        "schema": 1,
        "date": "2026-01-02",
        "commit": "0123456789ab",
        "machine": dict.fromkeys(MACHINE, "x") | {"cores": 2, "workers": 2},
        "toy": False,
        "seconds": 870.0,
        "bigram": 2.5,
        "jobs": {job.name: job_of(job.name) for job in JOBS},
    }
    return results | {"claims": [claim._asdict() for claim in judge(results)]}


def job_of(name: str) -> dict[str, Any]:
    job = next(job for job in JOBS if job.name == name)
    numbers = {
        "base": {"violation": 0.2, "main": 1.5, "mtp 1": 1.4},
        "unbalanced": {"violation": 0.7, "main": 1.5, "mtp 1": 1.4},
        "last": {"model": 0.9, "accuracy": 0.7, "format": 0.99},
    }.get(name, {"accuracy": 0.6, "format": 0.98, "length": 20.0, "kl": 0.1, "entropy": 0.2})
    numbers = numbers | {"loss": 1.6, "clipped": 0.0}
    found: dict[str, Any] = {
        "stage": job.stage,
        "inputs": dict(job.inputs),
        "settings": dict(job.settings),
        "seconds": 50.0,
        "commits": ["0123456789ab"],
        "steps": 40,
        "tokens": 40_960,
        "tokens_per_second": 1_024,
        "begin": numbers | {"model": 0.3},
        "end": numbers,
        "curves": {"step": STEPS} | {key: [x, x + 0.5, x, x] for key, x in numbers.items()},
        "evaluations": {"step": [0, 20, 40], "greedy": [0.0, 0.5, 0.6], "sampled": [0, 0.4, 0.5]},
    }
    found["evaluations"]["format_sampled"] = [0.0, 0.7, 0.85]
    if job.stage == "train":
        loss = 1.48 if name == "base" else 1.49
        found["evaluations"] |= {"held_out": [5.6, 2.0, loss], "accepted": [0.0, 0.7, 0.8]}
        found["loads"] = {"step": STEPS, "1": [[0.5, 1.5], [0.6, 1.4], [0.8, 1.2], [0.9, 1.1]]}
    if job.stage == "reward-model":
        found["evaluations"] = {"step": [0, 40], "ordered": [0.5, 0.95]}
    if job.stage == "extend":
        found |= phase(128 * 4, 1.02) | {"phases": [phase(128, 1.01)]}
    if name in ("sft", "grpo-0"):
        shown = {"samples_sampled": [["85+63=", "|`\n"]], "samples_greedy": [["85+63=", "x"]]}
        after = {"samples_sampled": [["85+63=", "<answer>148</answer>"]], "samples_greedy": []}
        found["samples"] = {"first": shown, "last": after}
    if job.kinds:
        both = zip(("greedy", "sampled"), RIGHT[name], strict=True)
        form = 0.85 if name == "sft" else 0.995
        found["held_out"] = {job.kinds[0]: {how: measured(right, form) for how, right in both}}
    return found


def phase(reached: int, ratio: float) -> dict[str, Any]:
    """A phase of the extension, from 32 positions."""
    positions = [1.0, 16.0, 32.0, 64.0, 256.0]

    def curve(end: float) -> dict[str, list[float]]:
        return {"position": positions, "loss": [end - 0.2 * log(x) for x in positions]}

    return {
        "lengths": {"original": 32, "reached": reached},
        "evaluations": {
            "step": [0, 60],
            "ratio": [1.5, ratio],
            "ratio_plain": [1.9, 1.8],
            "inside": [1.5, 1.4],
        },
        "positions": {
            "first": {"by_position": curve(2.6), "by_position_plain": curve(3.6)},
            "last": {"by_position": curve(2.5), "by_position_plain": curve(3.5)},
        },
    }


def measured(right: float, form: float) -> dict[str, Any]:
    return {
        "problems": 1215,
        "accuracy": right,
        "low": max(right - 0.03, 0.0),
        "high": right + 0.03,
        "format": form,
        "tokens": 20.5,
    }
