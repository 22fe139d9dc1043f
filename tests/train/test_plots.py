"""The pictures show the numbers of the results, and are small, deterministic SVG with text."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from refimpl.errors import CouldNotRun
from refimpl.train import plots
from refimpl.train.plots import PICTURES, SHOWN, draw
from refimpl.train.recipe import JOBS

from train.recipe_results import example

matplotlib = pytest.importorskip("matplotlib")


def drawn(name: str, results: dict[str, Any]) -> Any:
    """The axes of a picture."""
    from matplotlib.figure import Figure

    picture = next(x for x in PICTURES if x.name == name)
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure()
        picture.draw(figure, results["jobs"], results)
    return figure.axes


def lines(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {x.get_label(): (list(x.get_xdata()), list(x.get_ydata())) for x in axes.get_lines()}


def test_files(tmp_path: Path) -> None:
    """Well-formed, below 100 kB, every axis labelled, text as text, the same bytes again."""
    results = example()
    assert draw(results, tmp_path / "a") == list(PICTURES)
    with matplotlib.rc_context({"axes.labelsize": 30}):  # what a user has set changes nothing
        draw(results, tmp_path / "b")
        assert matplotlib.rcParams["axes.labelsize"] == 30
    files = sorted((tmp_path / "a").iterdir())
    assert [x.stem for x in files] == sorted(x.name for x in PICTURES)
    for file in files:
        data = file.read_bytes()
        assert data == (tmp_path / "b" / file.name).read_bytes()
        assert len(data) < 100_000
        texts = [
            x.text for x in ElementTree.fromstring(data).iter("{http://www.w3.org/2000/svg}text")
        ]
        assert {"step", "position of the token", "share of right answers"} & set(texts), file
        assert b"dc:date" not in data


def test_labels() -> None:
    """Every panel has what both axes mean; jobs have names."""
    for picture in PICTURES:
        axes = drawn(picture.name, example())
        for axis in axes:
            assert axis.get_ylabel() or picture.name == "accuracies"
        assert any(axis.get_xlabel() for axis in axes)
    assert set(SHOWN) == {job.name for job in JOBS}


def test_pretraining() -> None:
    left, right = drawn("pretraining", example())
    found = lines(left)
    assert found["next token"] == ([10, 20, 30, 40], [1.5, 2.0, 1.5, 1.5])
    assert found["MTP, 2 tokens ahead"][1] == [1.4, 1.9, 1.4, 1.4]
    assert found["held-out text"] == ([0, 20, 40], [5.6, 2.0, 1.48])
    assert set(found["bigram, held-out text"][1]) == {2.5}
    assert next(iter(lines(right).values())) == ([0, 20, 40], [0.0, 0.7, 0.8])


def test_load() -> None:
    """Experts along the map, steps across; each map and curve that of its own job."""
    results = example()
    results["jobs"]["unbalanced"]["loads"]["1"][0] = [0.1, 1.9]
    panels = {axes.get_title(loc="left"): axes for axes in drawn("load", results)}
    without = panels["without balancing"].images[0].get_array()
    assert without.shape == (2, 4)
    assert list(without[:, 0]) == [0.1, 1.9]
    assert list(panels["with bias balancing"].images[0].get_array()[0]) == [0.5, 0.6, 0.8, 0.9]
    found = lines(panels["max violation: max load / mean load − 1"])
    assert found["without balancing"][1][0] == 0.7
    assert found["with bias balancing"][1][0] == 0.2


def test_positions() -> None:
    (axes,) = drawn("positions", example())
    found = lines(axes)
    assert found["pre-trained, without YaRN"][1][0] == 3.6
    assert found["with YaRN, before training"][1][0] == 2.6
    assert {"after the phase ×4", "after the phase ×16"} < set(found)
    assert found["after ×16, YaRN switched off"][1][0] == 3.5
    assert [text.get_text() for text in axes.texts] == ["32", "128", "512"]


def test_reinforcement() -> None:
    results = example()
    results["jobs"]["permuted"]["curves"]["kl"] = [1.0, 2.0, 3.0, 4.0]
    panels = {axes.get_title(loc="left"): axes for axes in drawn("grpo", results)}
    assert lines(panels["KL to the start"])[SHOWN["permuted"]][1] == [1.0, 2.0, 3.0, 4.0]
    assert lines(panels["KL to the start"])[SHOWN["grpo-1"]][1] == [0.1, 0.6, 0.1, 0.1]
    assert len(panels) == 6


def test_accuracies() -> None:
    """Bars as long as the accuracies, with their intervals, beside the jobs' names."""
    results = example()
    (axes,) = drawn("accuracies", results)
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels[0] == "SFT (add2)"
    assert "GRPO, harder task (add3)" in labels
    greedy, sampled = (x for x in axes.containers if hasattr(x, "datavalues"))
    for above, below in zip(greedy, sampled, strict=True):  # the axis runs downwards
        assert above.get_y() + above.get_height() <= below.get_y() + 1e-9
    for bars, how in ((greedy, "greedy"), (sampled, "sampled")):
        for label, width in zip(labels, bars.datavalues, strict=True):
            name, kind = label[:-1].split(" (")
            job = next(x for x, shown in SHOWN.items() if shown == name)
            assert width == results["jobs"][job]["held_out"][kind][how]["accuracy"]
        low, high = bars.errorbar.lines[2][0].get_segments()[0][:, 0]
        assert (low, high) == pytest.approx((bars.datavalues[0] - 0.03, bars.datavalues[0] + 0.03))


def test_what_has_not_run_is_not_drawn(tmp_path: Path) -> None:
    results = example()
    results["jobs"] = {name: results["jobs"][name] for name in ("base", "long")}
    assert [x.name for x in draw(results, tmp_path)] == ["pretraining", "positions"]
    assert sorted(x.name for x in tmp_path.iterdir()) == ["positions.svg", "pretraining.svg"]


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(CouldNotRun, match=r"pip install 'deepseek-refimpl\[plots\]'"):
        draw(example(), tmp_path / "a")
    assert not (tmp_path / "a").exists()
