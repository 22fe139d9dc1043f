"""The truth as it is opened: config, entries, tensors, and what is wrong with a folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl.config import preset
from refimpl.errors import CouldNotRun
from refimpl.port.truth import Truth, config_from

from port.examples import TINY, Example, edited, parameters

NAME = "grad/model.norm.weight"


@pytest.mark.parametrize("name", ["tiny", "v3", "v2-lite"])
def test_config_survives_json(name: str) -> None:
    """YaRN's settings are a tuple with names: JSON makes a list of them."""
    config = preset(name)
    assert config_from(json.loads(json.dumps(asdict(config)))) == config
    assert config_from(asdict(config)) == config


def test_it_reads_what_was_written(example: Example) -> None:
    truth = Truth.open(str(example.truth))
    assert truth.kind == "model"
    assert truth.config == replace(TINY, balance_weight=0.02)
    assert truth.entries.keys() == example.arrays.keys()
    assert truth.types == ("float64", "float32", "bfloat16")
    for name, x in example.arrays.items():
        np.testing.assert_array_equal(truth.array(name), x)
    assert truth.entries[NAME].scale == np.abs(example.arrays[NAME]).max()
    assert NAME in truth
    assert "grad/no" not in truth


def test_a_tensor_that_is_stored_once(example: Example, tmp_path: Path) -> None:
    def change(index: Any) -> None:
        index["tensors"]["cot/other"] = {"same_as": NAME}
        index["tensors"][NAME] |= {"scale": None, "units": {"float32": None}}

    truth = Truth.open(edited(example.truth, tmp_path, change))
    np.testing.assert_array_equal(truth.array("cot/other"), example.arrays[NAME])
    assert np.isnan(truth.entries["cot/other"].scale)
    assert truth.entries["cot/other"].units == {"float32": np.inf}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda x: x["tensors"].pop("in/tokens"), "KeyError 'in/tokens'"),
        (lambda x: x["metadata"].pop("implementation"), "KeyError 'implementation'"),
        (lambda x: x["metadata"]["request"].pop("loss"), "KeyError 'loss'"),
        (lambda x: x["metadata"]["request"].update(loss="mine"), "loss must be one of"),
        (lambda x: x["metadata"].update(split={"rules": "x"}), "has no attribute 'items'"),
        (
            lambda x: x["metadata"].update(split={"rules": {"main": {}}, "shapes": [[1, 2]]}),
            "KeyError 'right'",
        ),
        (
            lambda x: x["metadata"].update(
                split={"rules": {"main": {"right": [1, 2]}}, "shapes": [[1, 2]]}
            ),
            "the factors of main must be a number for each part",
        ),
        (lambda x: x["metadata"].pop("format"), "must have format 1, got None: write it again"),
        (lambda x: x["metadata"].update(format=2), "must have format 1, got 2"),
        (lambda x: x.pop("tensors"), "broken: KeyError 'tensors'"),
        (lambda x: x.update(tensors=[1]), "broken"),
        (lambda x: x.update(metadata=3), "broken"),
        (lambda x: x["metadata"].update(kind="?"), "kind must be one of model, vectors"),
        (lambda x: x["metadata"].update(config=None), "a config belongs to kind model alone"),
        (lambda x: x["metadata"]["config"].update(heads=0), "heads must be an integer"),
        (lambda x: x["metadata"]["config"].pop("width"), "broken: TypeError"),
        (lambda x: x["metadata"]["config"].update(yarn=[0]), "yarn.factor"),
        (lambda x: x["tensors"][NAME].pop("file"), "broken: KeyError 'file'"),
        (lambda x: x["tensors"][NAME].update(file="../x.safetensors"), "the file of"),
        (lambda x: x["tensors"][NAME].update(file=7), "broken: TypeError"),
        (lambda x: x["tensors"][NAME].update(shape=[-1]), "the shape of"),
        (lambda x: x["tensors"][NAME].update(shape="x"), "the shape of"),
        (lambda x: x["tensors"][NAME].update(units={"float32": -1}), "the units of"),
        (lambda x: x["tensors"][NAME].update(units={"float32": "x"}), "could not convert"),
        (lambda x: x["tensors"].update({"cot/x": {"same_as": "no"}}), "broken: KeyError 'no'"),
    ],
)
def test_an_index_that_is_broken(example: Example, tmp_path: Path, change: Any, line: str) -> None:
    folder = edited(example.truth, tmp_path, change)
    with pytest.raises(CouldNotRun) as caught:
        Truth.open(folder)
    assert line in str(caught.value)
    assert str(folder / "index.json") in str(caught.value)


def test_a_file_that_is_not_as_the_index_says(example: Example, tmp_path: Path) -> None:
    for key, value in (("shape", [3]), ("dtype", "float32")):
        folder = edited(
            example.truth, tmp_path, lambda x, k=key, v=value: x["tensors"][NAME].update({k: v})
        )
        with pytest.raises(CouldNotRun, match=r"is not as index.json says: grad/model\.norm"):
            Truth.open(folder).array(NAME)
    (folder / "grad-norm.safetensors").unlink()
    with pytest.raises(CouldNotRun, match=r"grad-norm.safetensors can't be read"):
        Truth.open(folder).array(NAME)


def test_a_folder_without_a_result(tmp_path: Path) -> None:
    with pytest.raises(CouldNotRun, match="does not exist"):
        Truth.open(tmp_path / "no")
    with pytest.raises(CouldNotRun, match=r"index.json can't be read"):
        Truth.open(tmp_path)
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(CouldNotRun, match="is unfinished: run the command that writes it again"):
        Truth.open(tmp_path)


def test_the_checkpoint_is_the_one_it_was(example: Example, tmp_path: Path) -> None:
    """By its content: a copy elsewhere is the same, one that was changed is not."""
    name, x = next(iter(parameters().items()))
    found = Truth.open(example.truth).checkpoint()
    np.testing.assert_array_equal(found.tensor(name), x)
    assert found.config.conventions == TINY.conventions
    copy = shutil.copytree(example.truth.parent / "checkpoint", tmp_path / "copy")
    there = {"path": str(copy)}
    truth = edited(example.truth, tmp_path, lambda x: x["metadata"]["checkpoint"].update(there))
    np.testing.assert_array_equal(Truth.open(truth).checkpoint().tensor(name), x)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 101.0}))
    with pytest.raises(CouldNotRun, match=r"copy is not the checkpoint that .* was made from"):
        Truth.open(truth).checkpoint()
    shutil.rmtree(copy)
    with pytest.raises(CouldNotRun, match="copy does not exist"):
        Truth.open(truth).checkpoint()
    truth = edited(example.truth, tmp_path, lambda x: x["metadata"].update(checkpoint=None))
    with pytest.raises(CouldNotRun, match="names no checkpoint"):
        Truth.open(truth).checkpoint()
