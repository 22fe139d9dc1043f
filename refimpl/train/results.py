"""What the jobs of a recipe found, in one file: OUT/results.json. The claims, the pictures and the
report are made of it alone.

A job's entry has its settings that differ from the stage's defaults, its seconds, the commit at
which it began (several if it went on at others), what its run told (`run_of`) and its accuracies on
held-out problems, each with its 95 % interval.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from itertools import pairwise
from math import floor, isfinite, log10
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..bench.cpu.run import model_name
from ..bench.run import commit_of_checkout
from ..files import read_json, write_json, write_text
from .claims import judge
from .graph import Seconds
from .machine import open_machine
from .recipe import Job, Recipe, held_out_file
from .save import PHASE

__all__ = ["TIMES", "gather", "record_commit", "run_of", "write_results"]

SCHEMA = 1
POINTS = 60  # of a curve at most
HEATED = 60  # of a map of loads at most
SOURCES = ("refimpl", "kernels")  # folders of the checkout that a job runs
COMMITS = "commits.json"
TIMES = ("seconds", "tokens_per_second")  # of a step
DIGITS = 5  # of a number of a curve


def gather(recipe: Recipe, *, workers: int, toy: bool) -> dict[str, Any]:
    """The results of all jobs that are finished."""
    seconds = Seconds(recipe.out / "seconds.json")
    finished = [x for x in recipe.jobs if (recipe.out / x.name / "result.json").exists()]
    commits = commits_of(recipe.out)
    every = dict.fromkeys(x for job in finished for x in commits.get(job.name, ["unknown"]))
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": ", ".join(every),
        "machine": machine_of(recipe.common) | {"workers": workers},
        "toy": toy,
        "seconds": round(seconds.before, 1),
        "bigram": None,
        "jobs": {
            x.name: job_of(recipe.out, x)
            | {
                "seconds": round(seconds.jobs.get(x.name, 0.0), 1),
                "commits": commits.get(x.name, ["unknown"]),
            }
            for x in finished
        },
    }
    for job in finished:
        if job.name == "base":
            told = read_json(recipe.out / job.name / "result.json")["evaluation"]
            results["bigram"] = told["bigram"]
    return results | {"claims": [x._asdict() for x in judge(results)]}


def record_commit(out: Path, name: str) -> None:
    """Note the commit of the sources at which a job begins, or goes on."""
    commits, now = commits_of(out), commit_of_checkout(*SOURCES)
    if now not in commits.setdefault(name, []):
        commits[name].append(now)
        write_json(out / COMMITS, commits)


def commits_of(out: Path) -> dict[str, list[str]]:
    """The commits of each job that has begun."""
    found: dict[str, list[str]] = read_json(out / COMMITS) if (out / COMMITS).exists() else {}
    return found


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """As JSON, a list of numbers on one line."""
    write_text(path, _json(results) + "\n")


def machine_of(common: Mapping[str, str]) -> dict[str, Any]:
    """What decides the speed, and with what was computed."""
    machine = open_machine(**common)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {
        "processor": model_name(),
        "cores": cores,
        "backend": machine.backend,
        "implementation": machine.implementation,
        "dtype": machine.dtype,
        "refimpl": __version__,
        "Python": platform.python_version(),
        "NumPy": np.__version__,
        "BLAS": blas(),
    }
    if machine.backend == "cupy":
        with suppress(ImportError, AttributeError):
            import cupy

            device = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
            found["device"] = device["name"].decode()
    return found


def blas() -> str:
    """The library that NumPy multiplies with, as far as it tells."""
    with suppress(ImportError):
        from threadpoolctl import threadpool_info

        for x in threadpool_info():
            if x["user_api"] == "blas":
                return " ".join(
                    str(x.get(key) or "") for key in ("internal_api", "version", "architecture")
                )
    built: Any = np.show_config(mode="dicts")
    found = built.get("Build Dependencies", {}).get("blas", {})
    return f"{found.get('name', 'unknown')} {found.get('version', '')}".strip()


def job_of(out: Path, job: Job) -> dict[str, Any]:
    place = out / job.name
    found: dict[str, Any] = {
        "stage": job.stage,
        "inputs": dict(job.inputs),
        "settings": dict(job.settings),
    }
    found |= run_of(place)
    if phases := sorted(place.glob(f"{PHASE}*")):
        found["phases"] = [run_of(phase) for phase in phases]
    files = [held_out_file(place, kind) for kind in job.kinds]
    for file in files:
        if file.exists():
            for name, x in read_json(file)["results"].items():
                kind, how = name.split()
                numbers = {key: value for key, value in x.items() if key != "samples"}
                found.setdefault("held_out", {}).setdefault(kind, {})[how] = numbers
    return found


def run_of(place: Path) -> dict[str, Any]:
    """What a stage's run told.

    Its keys:

        steps, tokens       of all
        tokens_per_second   over the steps' seconds, evaluations left out
        begin, end          means over the first tenth and the last fifth of the steps
        curves              by name over the steps, each point a mean of neighbours
        loads               [points][experts] by layer: the tokens of an expert as a share of the
                            mean; steps
        evaluations         by name, at the steps of the evaluations
        positions           the loss by position, for the first and the last evaluation
        samples             prompts and completions of the first and the last evaluation
    """
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    steps = [_numbers(x) for x in lines if x["kind"] == "step"]
    evaluations = [x for x in lines if x["kind"] == "evaluation"]
    result = read_json(place / "result.json")
    found: dict[str, Any] = {"steps": result["steps"], "tokens": result["tokens"]}
    if steps:
        spent = sum(x["seconds"] for x in lines if x["kind"] == "step")
        found["tokens_per_second"] = round(result["tokens"] / spent)
        found["begin"] = _means(steps[: max(len(steps) // 10, 1)])
        found["end"] = _means(steps[-max(len(steps) // 5, 1) :])
        found["curves"] = curves(steps)
    if loads := [(x["step"], x["loads"]) for x in lines if x["kind"] == "step" and "loads" in x]:
        found["loads"] = heated(loads)
    numbers = [_numbers(x) for x in evaluations]
    names = dict.fromkeys(name for x in numbers for name in x)
    found["evaluations"] = {
        name: [_rounded(x[name]) if name in x else None for x in numbers] for name in names
    }
    first_and_last = {"first": evaluations[0], "last": evaluations[-1]} if evaluations else {}
    for when, x in first_and_last.items():
        for name, value in x.items():
            if name.startswith("by_position"):
                found.setdefault("positions", {}).setdefault(when, {})[name] = octaves(value)
            if name.startswith("samples"):
                found.setdefault("samples", {}).setdefault(when, {})[name] = value
    if result["stage"] == "extend":
        config = read_json(place / "checkpoint" / "config.json")
        original = config["rope_scaling"]["original_max_position_embeddings"]
        found["lengths"] = {"original": original, "reached": config["max_position_embeddings"]}
    return found


def curves(steps: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Every number that all steps told, averaged over stretches; the step is each one's last."""
    parts = np.array_split(np.arange(len(steps)), min(POINTS, len(steps)))
    names = [name for name in steps[0] if name != "step" and all(name in x for x in steps)]
    found = {"step": [steps[part[-1]]["step"] for part in parts]}
    for name in names:
        values = np.array([x[name] for x in steps], np.float64)
        found[name] = [_rounded(float(values[part].mean())) for part in parts]
    return found


def heated(loads: Sequence[tuple[int, Mapping[str, Sequence[int]]]]) -> dict[str, Any]:
    """The experts' loads over the steps, as shares of the mean load."""
    parts = np.array_split(np.arange(len(loads)), min(HEATED, len(loads)))
    found: dict[str, Any] = {"step": [loads[part[-1]][0] for part in parts]}
    for layer in loads[0][1]:
        counts = np.array([x[layer] for _, x in loads], np.float64)
        shares = counts / counts.mean(axis=1, keepdims=True)
        found[layer] = [[round(float(x), 3) for x in shares[part].mean(axis=0)] for part in parts]
    return found


def octaves(losses: Sequence[float]) -> dict[str, list[float]]:
    """The loss by position, averaged over eighths of an octave; positions count from 1."""
    count = len(losses)
    edges = np.unique(np.round(2 ** np.arange(0, np.log2(count) + 1 / 8, 1 / 8)).astype(int))
    edges = np.append(edges[edges <= count * 0.95], count + 1)  # no sliver at the end
    spans = list(pairwise(edges))
    return {
        "position": [_rounded(float(np.sqrt(a * (b - 1.0)))) for a, b in spans],
        "loss": [_rounded(float(np.mean(losses[a - 1 : b - 1]))) for a, b in spans],
    }


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics; a list of a few, as that of the MTP modules, by place."""
    found = {}
    for name, x in line.items():
        if isinstance(x, (int, float)) and name not in (*TIMES, "kind"):
            found[name] = x
        elif name == "mtp":
            found |= {f"mtp {depth}": value for depth, value in enumerate(x, 1)}
    return found


def _means(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = [name for name in steps[0] if name != "step" and all(name in x for x in steps)]
    return {name: float(np.mean([x[name] for x in steps])) for name in names}


def _rounded(x: float) -> float:
    """To a few significant digits; integers stay."""
    if isinstance(x, int) or not x or not isfinite(x):
        return x
    return round(x, DIGITS - 1 - floor(log10(abs(x))))


def _json(x: Any, indent: str = "") -> str:
    inner = f"{indent} "
    if isinstance(x, Mapping) and x:
        parts = [f"{inner}{json.dumps(key)}: {_json(value, inner)}" for key, value in x.items()]
        return "{\n" + ",\n".join(parts) + f"\n{indent}}}"
    if isinstance(x, (list, tuple)) and any(isinstance(y, (Mapping, list, tuple)) for y in x):
        return "[\n" + ",\n".join(f"{inner}{_json(y, inner)}" for y in x) + f"\n{indent}]"
    return json.dumps(x, ensure_ascii=False)
