"""What is said about somebody: with its version, how it is known, and the test that repeats it."""

from __future__ import annotations

import re
import tomllib

from refimpl.conventions import HOW, TRAPS
from refimpl.conventions.trap import VERSIONS, WHO, read, run, told

from support import ROOT

SAID = [(trap.title, name, what) for trap in TRAPS for name, what in trap.who.items()]


def test_every_statement_carries_a_version_and_how_it_is_known() -> None:
    for title, name, what in SAID:
        assert what.text, (title, name)
        assert what.how in HOW, (title, name)
        assert what.version(name), (title, name)
        assert name in VERSIONS, (title, name)
        assert not re.search(r"\b(not run|read, not|second-hand)\b", what.text), (title, name)
    assert set(WHO) <= set(VERSIONS)


def test_every_test_that_is_named_exists() -> None:
    """And is named by a statement that says `run`."""
    for title, name, what in SAID:
        if not what.test:
            continue
        assert what.how == "run", (title, name)
        file, _, function = what.test.partition("::")
        assert f"def {function}(" in (ROOT / file).read_text(), what.test


def test_every_run_of_transformers_trl_and_verl_has_its_test() -> None:
    """Those can be installed anywhere; Megatron's and torchtitan's need a checkout. What was run of
    the others was run once."""
    for title, name, what in SAID:
        if what.how == "run" and name not in ("Megatron", "torchtitan"):
            assert bool(what.test) == (name in ("HF", "TRL", "verl")), (title, name)


def test_sources() -> None:
    assert read("x").source("vLLM") == "read, vLLM 03356f8"
    assert read("x", at="SGLang 0114f9c").source("SGLang") == "read, SGLang 0114f9c"
    assert run("x", test="a::b").source("HF") == "run, " + VERSIONS["HF"]
    assert told("x").source("DeepSeek") == "told"


def test_the_versions_are_those_that_are_installed() -> None:
    """What `make oracle` and `make peers` run is what the page says."""
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert VERSIONS["HF"].replace(" ", "==") in pins
    peers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in ("TRL", "verl"):
        assert VERSIONS[name].lower().replace(" ", "==") in peers["peers"]
