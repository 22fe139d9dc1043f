"""What the recipe must show, judged from its results: each claim with its numbers and its bound.

A claim whose jobs have not all run is left out. A claim without a bound is shown, not judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

__all__ = ["Claim", "judge"]

RISE = 0.15  # of an accuracy by GRPO
SECONDS = 900
HOW = ("greedy", "sampled")


class Claim(NamedTuple):
    """A sentence about the recipe, with its numbers and whether its bound holds."""

    name: str
    values: dict[str, float]
    bound: str
    holds: bool | None  # None: without a bound

    @property
    def numbers(self) -> str:
        """Its values by name, as text."""
        return ", ".join(f"{name} {number(x)}" for name, x in self.values.items())

    @property
    def verdict(self) -> str:
        return {True: "holds", False: "FAILS", None: "–"}[self.holds]


class Accuracy(NamedTuple):
    right: float
    low: float  # of the 95 % interval
    high: float


def judge(results: Mapping[str, Any]) -> list[Claim]:
    """All claims whose jobs have run."""
    found: list[Claim] = []
    for part in PARTS:
        try:
            found += part(results)
        except Missing:
            continue
    return found


def number(x: float) -> str:
    """Three digits behind the point; of large ones, none."""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3f}"


class Missing(Exception):
    """A job has not run."""


def job(results: Mapping[str, Any], name: str) -> Any:
    if name not in results["jobs"]:
        raise Missing(name)
    return results["jobs"][name]


def accuracy(results: Mapping[str, Any], name: str, how: str, kind: str = "add2") -> Accuracy:
    """On held-out problems."""
    try:
        found = job(results, name)["held_out"][kind][how]
    except KeyError as error:
        raise Missing(name) from error
    return Accuracy(found["accuracy"], found["low"], found["high"])


def seeds(results: Mapping[str, Any]) -> list[str]:
    """The GRPO jobs that differ by their seed; all three, or `Missing`."""
    names = ["grpo-0", "grpo-1", "grpo-2"]
    for name in names:
        job(results, name)
    return names


def pre_training(results: Mapping[str, Any]) -> Iterator[Claim]:
    loss, bigram = job(results, "base")["evaluations"]["held_out"][-1], results["bigram"]
    values = {"bigram": bigram, "model": loss, "below": bigram - loss}
    yield Claim(
        "held-out loss in nats, after pre-training", values, "below ≥ 0.5", bigram - loss >= 0.5
    )


def balancing(results: Mapping[str, Any]) -> Iterator[Claim]:
    base, none = job(results, "base"), job(results, "unbalanced")
    violation = {"balanced": base["end"]["violation"], "unbalanced": none["end"]["violation"]}
    ratio = violation["unbalanced"] / max(violation["balanced"], 1e-9)
    yield Claim(
        "max violation of the worst layer, last 20 % of steps",
        violation | {"ratio": ratio},
        "ratio ≥ 3",
        ratio >= 3,
    )
    loss = [x["evaluations"]["held_out"][-1] for x in (base, none)]
    yield Claim(
        "held-out loss with bias balancing and without",
        {"balanced": loss[0], "unbalanced": loss[1], "ratio": loss[0] / loss[1]},
        "ratio ≤ 1.01",
        loss[0] <= 1.01 * loss[1],
    )


def yarn(results: Mapping[str, Any]) -> Iterator[Claim]:
    """Loss beyond the original length over loss inside it: see `extend`."""
    last = job(results, "long")
    phases = [*last.get("phases", []), last]
    ratios = {
        f"phase {number}": phase["evaluations"]["ratio"][-1]
        for number, phase in enumerate(phases, 1)
    }
    yield Claim(
        "loss beyond the original length over loss inside, with YaRN",
        ratios,
        "each ≤ 1.05",
        all(ratio <= 1.05 for ratio in ratios.values()),
    )
    plain = phases[0]["evaluations"]["ratio_plain"][0]
    yield Claim(
        "the same of the pre-trained model, without YaRN", {"ratio": plain}, "≥ 1.2", plain >= 1.2
    )


def reinforced(results: Mapping[str, Any]) -> Iterator[Claim]:
    for how in HOW:
        start = accuracy(results, "sft", how).right
        ends = {name: accuracy(results, name, how).right for name in seeds(results)}
        yield Claim(
            f"{how} accuracy from SFT to GRPO",
            {"sft": start} | ends,
            f"each ≥ sft + {RISE}",
            all(end >= start + RISE for end in ends.values()),
        )
    kept = {
        name: job(results, name)["held_out"]["add2"]["sampled"]["format"]
        for name in ("sft", *seeds(results))
    }
    yield Claim(
        "sampled answers in the format",
        kept,
        "sft < 0.9, the others ≥ 0.99",
        kept["sft"] < 0.9 and all(kept[name] >= 0.99 for name in seeds(results)),
    )


def permuted(results: Mapping[str, Any]) -> Iterator[Claim]:
    for how in HOW:
        start, end = accuracy(results, "sft", how), accuracy(results, "permuted", how).right
        values = {"sft": start.right, "its interval's end": start.high, "permuted": end}
        yield Claim(
            f"{how} accuracy by GRPO with permuted rewards",
            values | {"fall": start.right - end},
            "permuted ≤ its interval's end",
            end <= start.high,
        )


def continued(results: Mapping[str, Any]) -> Iterator[Claim]:
    for how in HOW:
        ends = [accuracy(results, name, how).right for name in seeds(results)]
        values = {"continued SFT": accuracy(results, "continued", how).right}
        yield Claim(
            f"{how} accuracy by continued SFT, beside GRPO",
            values | {"GRPO, mean": sum(ends) / len(ends)},
            "",
            None,
        )


def minibatches(results: Mapping[str, Any]) -> Iterator[Claim]:
    clipped = max(job(results, "grpo-0")["curves"]["clipped"])
    for how in HOW:
        ends = [accuracy(results, name, how).right for name in seeds(results)]
        values = {"one": accuracy(results, "one-update", how).right}
        yield Claim(
            f"{how} accuracy by GRPO with one update a step, beside four",
            values | {"four, mean": sum(ends) / len(ends), "top of the clip curve": clipped},
            "",
            None,
        )


def harder(results: Mapping[str, Any]) -> Iterator[Claim]:
    kind = job(results, "grpo-hard")["settings"]["kinds"][0]
    for how, bound in (("sampled", f"grpo ≥ sft + {RISE}"), ("greedy", "")):
        start, end = (
            accuracy(results, name, how, kind).right for name in ("sft-hard", "grpo-hard")
        )
        holds = end >= start + RISE if bound else None
        yield Claim(f"{how} accuracy on {kind}", {"sft": start, "grpo": end}, bound, holds)


def reward_model(results: Mapping[str, Any]) -> Iterator[Claim]:
    ordered = job(results, "reward-model")["evaluations"]["ordered"][-1]
    yield Claim(
        "held-out pairs that the reward model orders", {"share": ordered}, "≥ 0.9", ordered >= 0.9
    )


def last_stage(results: Mapping[str, Any]) -> Iterator[Claim]:
    last = job(results, "last")
    begin, end = last["begin"]["model"], last["end"]["model"]
    yield Claim(
        "the model's reward in the last stage: first tenth and last fifth of the steps",
        {"first": begin, "last": end},
        "last > first",
        end > begin,
    )
    for how in HOW:
        start, after = (
            accuracy(results, last["inputs"]["checkpoint"], how),
            accuracy(results, "last", how),
        )
        yield Claim(
            f"{how} accuracy over the last stage",
            {"before": start.right, "its interval's start": start.low, "after": after.right},
            "after ≥ its interval's start",
            after.right >= start.low,
        )


def student(results: Mapping[str, Any]) -> Iterator[Claim]:
    """Better means that the 95 % intervals do not meet."""
    names = {
        "distilled": "distilled",
        "gold solutions": "student-gold",
        "answers alone": "student-answers",
        "its own GRPO": "student-grpo",
    }
    for how in HOW:
        found = {shown: accuracy(results, name, how) for shown, name in names.items()}
        others = (found["answers alone"], found["its own GRPO"])
        yield Claim(
            f"{how} accuracy of the student",
            {shown: x.right for shown, x in found.items()},
            "distilled above answers alone and its own GRPO, intervals apart",
            all(found["distilled"].low > other.high for other in others),
        )


def whole(results: Mapping[str, Any]) -> Iterator[Claim]:
    """Only where all that the claims need has run: each of the others is there."""
    for part in PARTS[:-1]:
        list(part(results))
    seconds = results["seconds"]
    yield Claim("seconds in all", {"seconds": seconds}, f"≤ {SECONDS}", seconds <= SECONDS)


PARTS: tuple[Callable[[Mapping[str, Any]], Iterator[Claim]], ...] = (
    pre_training,
    balancing,
    yarn,
    reinforced,
    permuted,
    continued,
    minibatches,
    harder,
    reward_model,
    last_stage,
    student,
    whole,
)
