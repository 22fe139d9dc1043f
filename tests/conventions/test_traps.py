"""One test a trap: the two numbers differ, and by what theory says where it says so. And the page
is the command's."""

from __future__ import annotations

import re
from dataclasses import fields
from math import isnan, log

import numpy as np

from refimpl.config import Conventions
from refimpl.conventions import TRAPS, markdown
from refimpl.conventions import examples as ex

from support import ROOT, refimpl_here


def all_differ(numbers: ex.Numbers, least: float = 1e-3) -> None:
    values = list(numbers.values())
    for i, value in enumerate(values):
        for other in values[:i]:
            assert abs(value - other) > least * max(abs(value), abs(other)), numbers


def test_trap_01() -> None:
    all_differ(ex.mtp_order())


def test_trap_02() -> None:
    all_differ(ex.mtp_hidden())


def test_trap_03() -> None:
    """One sum over 2 × 18 targets of MTP module 1, divided by 2 × 20 positions, 36 targets or 38
    main targets."""
    numbers = ex.mtp_normaliser()
    all_differ(numbers)
    sums = [numbers["positions"] * 40, numbers["valid"] * 36, numbers["main"] * 38]
    np.testing.assert_allclose(sums, sums[0], rtol=1e-14)


def test_trap_04() -> None:
    all_differ(ex.mtp_zero_first_embedding())


def test_trap_05() -> None:
    """With −∞ a constant on all biases changes nothing: −1 and 0 give the same loss."""
    numbers = ex.masked_groups()
    all_differ(numbers)
    np.testing.assert_allclose(numbers["-inf"], ex.main(), rtol=1e-15)


def test_trap_06() -> None:
    all_differ(ex.latent_norms())


def test_trap_07() -> None:
    """With `always` the configured length does not matter."""
    numbers = ex.yarn_when()
    all_differ(numbers)
    assert numbers["always"] == ex.main()


def test_trap_08() -> None:
    numbers = ex.mscale()
    np.testing.assert_allclose(
        numbers["mscale_all_dim 1"], 192**-0.5 * (0.1 * log(40) + 1) ** 2, rtol=1e-15
    )
    np.testing.assert_allclose(numbers["mscale_all_dim 0"], 192**-0.5, rtol=1e-15)
    all_differ(numbers)
    all_differ(ex.mscale_default(), 5e-4)
    all_differ(ex.yarn_factor())


def test_trap_09() -> None:
    all_differ(ex.balance_counts())


def test_trap_10() -> None:
    """γ sign(3 − 9) = −γ; the mean change of loads 9, 1, 1, 1 is γ/2."""
    assert ex.bias_centre() == {"False": -0.001, "True": -0.0015}


def test_trap_11() -> None:
    numbers = ex.gate_precision()
    assert numbers["float32"] < 0.2 < 1 < numbers["bfloat16"] < numbers["scores too"]
    epsilon = ex.gate_epsilon()
    assert isnan(epsilon["0"])
    assert epsilon["1e-20"] == 0


def test_bfloat16_rounds_to_even() -> None:
    x = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3.140625, 0], np.float32)
    np.testing.assert_array_equal(
        ex.bfloat16(x), np.array([1, 1, 1 + 2**-6, 1 + 2**-7, -3.140625, 0], np.float32)
    )


def test_trap_12() -> None:
    all_differ(ex.gate_bias())
    all_differ(ex.softmax_normalise())


def test_trap_13() -> None:
    all_differ(ex.routed_branch())


def test_trap_14() -> None:
    numbers = ex.weight_scale_inv()
    np.testing.assert_allclose(numbers["multiply"], 0.05, rtol=1e-15)
    np.testing.assert_allclose(numbers["divide"], 448**2 / 0.05, rtol=1e-15)
    floor = ex.amax_floor()
    assert floor["floor 0.0001"] == 0
    assert isnan(floor["floor 0"])


def test_trap_15() -> None:
    numbers = ex.active_parameters()
    assert [round(x, 2) for x in numbers.values()] == [36.63, 37.55]


def test_trap_16() -> None:
    all_differ(ex.grpo_level())


def test_trap_17() -> None:
    """Rewards 1, 0, 0, 1: mean 1/2, deviation 1/2 with ddof 0."""
    numbers = ex.advantage_std()
    assert numbers["ddof 0"] == 1.0
    np.testing.assert_allclose(numbers["ddof 1"], (3 / 4) ** 0.5, rtol=1e-15)
    np.testing.assert_allclose(numbers["TRL"], 0.5 / ((1 / 3) ** 0.5 + 1e-4), rtol=1e-15)
    np.testing.assert_allclose(numbers["verl"], 0.5 / ((1 / 3) ** 0.5 + 1e-6), rtol=1e-15)
    all_differ(numbers, 1e-7)
    assert ex.group_of_one() == {"alone 0": 0.0, "verl": 1 / (1 + 1e-6)}


def test_trap_18() -> None:
    numbers = ex.kl_gradient()
    np.testing.assert_allclose(list(numbers.values()), [np.expm1(3), 0, 3], rtol=1e-15)


def test_trap_19() -> None:
    all_differ(ex.clip_width())


def test_trap_20() -> None:
    all_differ(ex.rotation(), 5e-4)


def test_trap_21() -> None:
    """A latent of mean square m is normed to √(m / (m + eps))."""
    numbers = ex.latent_eps()
    square = np.mean((0.006 * np.random.default_rng(0).normal(size=(1, 512))) ** 2)
    np.testing.assert_allclose(
        list(numbers.values()), np.sqrt(square / (square + np.array([1e-5, 1e-6]))), rtol=1e-14
    )


def test_trap_22() -> None:
    assert 1e-8 < ex.hidden_float32()["float32 inside"] < 1e-5


def test_each_trap_has_its_test_and_numbers() -> None:
    assert len(TRAPS) == 22
    for number, trap in enumerate(TRAPS, 1):
        assert f"test_trap_{number:02}" in globals()
        assert trap.who
        assert trap.field
        assert trap.default
        assert trap.tell.endswith(".")
        for _, example in trap.measures:
            assert len(example()) >= 2
    assert [n for n, trap in enumerate(TRAPS, 1) if trap.checkpoint] == [14]


def test_every_field_of_the_record_is_in_a_trap() -> None:
    """A convention that no trap explains would be one that nobody can find."""
    named = " ".join(trap.field for trap in TRAPS)
    missing = {f.name for f in fields(Conventions)} - set(re.findall(r"\w+", named))
    assert missing <= {"rope_layout", "target_after_padding", "blind_query"}, missing


def test_defaults_are_the_records() -> None:
    record = Conventions()
    for trap in TRAPS:
        for name in re.findall(r"`Conventions\.(\w+)`", trap.field):
            value = getattr(record, name)
            wanted = f"{value:g}" if isinstance(value, float) else str(value)
            assert wanted in trap.default.split(", "), trap.title


def test_page_is_what_the_command_writes() -> None:
    assert (ROOT / "derivations" / "conventions.md").read_text() == markdown()
    assert refimpl_here("conventions", "--markdown").stdout == markdown()
