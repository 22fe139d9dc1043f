"""The page has every claim, picture, accuracy, sample and job, and no text breaks its tables."""

from __future__ import annotations

import json
import re

from refimpl.train.claims import judge
from refimpl.train.plots import PICTURES
from refimpl.train.recipe import JOBS
from refimpl.train.report import report

from support import ROOT
from train.recipe_results import example


def test_all_of_it() -> None:
    results = example()
    page = report(results, PICTURES, "pictures")
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    for claim in results["claims"]:
        verdict = "holds" if claim["holds"] else "–"
        assert any(row.startswith(f"| {claim['name']} |") and verdict in row for row in rows)
    for picture in PICTURES:
        assert f"![{picture.title}](pictures/{picture.name}.svg)" in page
    for job in JOBS:
        assert sum(row.startswith(f"| {job.name} | {job.stage} |") for row in rows) == 1
    assert "| GRPO, seed 1 | add2 | 1,215 | 0.760 (0.730 … 0.790) | 0.610 (0.580 … 0.640) |" in page
    assert "All jobs together took 14 min 30 s." in page
    assert "mean nothing" not in page


def test_tables_stay_whole() -> None:
    """A sample may hold what Markdown reads: every row has as many cells as its head."""
    page = report(example(), [], "")
    assert "| SFT | `85+63=` | `\\|'\\n` | `<answer>148</answer>` |" in page
    for block in page.split("\n\n"):
        if block.startswith("| "):
            cells = {len(re.split(r"(?<!\\)\|", row)) for row in block.splitlines()}
            assert len(cells) == 1, block
    assert "![" not in page


def test_failures_and_toys_are_said() -> None:
    results = example() | {"toy": True}
    results["claims"][0]["holds"] = False
    page = report(results, [], "")
    assert "| below ≥ 0.5 | FAILS |" in page
    assert "its numbers mean nothing" in page


def test_a_part_of_a_recipe() -> None:
    """Without pictures, accuracies and samples the page has none of their headings."""
    results = example()
    results["jobs"] = {"base": results["jobs"]["base"]}
    page = report(results, [], "")
    assert re.findall("^## (.*)", page, re.M) == ["Claims", "Jobs"]


def test_what_is_committed_is_one() -> None:
    """Claims, report and pictures follow from the committed results, every claim holds, and the
    page has these numbers."""
    folder = ROOT / "benchmarks" / "results" / "recipe"
    results = json.loads((folder / "results.json").read_text())
    claims = judge(results)
    assert [x._asdict() for x in claims] == results["claims"]
    assert not results["toy"]
    assert [x.name for x in claims if x.holds is False] == []
    assert (folder / "report.md").read_text() == report(results, PICTURES, "pictures")
    names = {f"{x.name}.svg" for x in PICTURES}
    assert {x.name for x in (folder / "pictures").iterdir()} == names
    page = (ROOT / "derivations" / "recipe.md").read_text().splitlines()
    for claim in claims:
        row = f"| {claim.name} | {claim.numbers} | {claim.bound} | {claim.verdict} |"
        assert row in page, row
    values = {claim.name: claim.values for claim in claims}
    found, student = (
        values[f"greedy accuracy {x}"] for x in ("from SFT to GRPO", "of the student")
    )
    ends = [x for name, x in found.items() if name != "sft"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    for said in (
        f"{found['sft']:.2f} after fine-tuning, {min(ends):.2f} to {max(ends):.2f} after GRPO",
        f"{student['distilled']:.2f} from its teacher's solutions",
        f"{student['its own GRPO']:.2f} by its own GRPO",
        f"{round(results['seconds'] / 60)} minutes on two cores",
    ):
        assert said in readme, said
