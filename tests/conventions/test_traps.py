"""One test a trap: the two numbers differ, and by what theory says where it says so. And the page
is the command's."""

from __future__ import annotations

import re
from dataclasses import fields
from math import isnan, log

import numpy as np

from refimpl.config import Conventions
from refimpl.conventions import TRAPS, find, markdown
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
    """Four chains, vLLM's among them, and four losses."""
    numbers = ex.mtp_hidden()
    all_differ(numbers, 5e-4)
    assert numbers.pop("normed_first")
    all_differ(numbers)


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
    """Divided by the mean length, sequence b has (T_b / mean)² of its loss: of 11, 7 and 4 tokens
    alike in all else, 25 % more together."""
    all_differ(ex.balance_counts())
    all_differ(ex.padded_balance(), 0.05)
    lengths = np.array([11, 7, 4])
    np.testing.assert_allclose(np.mean((lengths / lengths.mean()) ** 2), 186 / 3 * 9 / 22**2)


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


def test_trap_15() -> None:
    numbers = ex.active_parameters()
    assert [round(x, 2) for x in numbers.values()] == [36.63, 37.55]


def test_trap_16() -> None:
    """The product of four e^0.1 is e^0.4; clamped at e¹⁰, e¹² is 7 times smaller; δ = 1.1 cuts
    ρ = 1.15, which the dual clip leaves alone where A > 0."""
    all_differ(ex.grpo_level())
    np.testing.assert_allclose(list(ex.vespo_weight().values()), np.exp([0.4, 0.1]), rtol=1e-14)
    np.testing.assert_allclose(list(ex.log_ratio_bound().values()), np.exp([12, 10]), rtol=1e-12)
    np.testing.assert_allclose(list(ex.delta().values()), [-1.15, -1.1], rtol=1e-14)


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
    """Angles in float32 are good to 2⁻²⁴ of themselves: a cosine at position t to 6e-8 t."""
    assert 1e-8 < ex.hidden_float32()["float32 inside"] < 1e-5
    for position, error in ex.late_angles().items():
        t = int(position.split()[1])
        assert 1e-9 * t < error < 2**-24 * t


def test_trap_23() -> None:
    """One token more in 2 × 20 moves the balance loss by less than a twentieth."""
    numbers = ex.mtp_tail()
    all_differ(numbers)
    assert abs(numbers["T"] / numbers["T − k"] - 1) < 1 / 20


def test_trap_24() -> None:
    """What each choice keeps from the MTP losses, and nothing else."""
    norm = ex.mtp_detach_norm()
    head = ex.mtp_detach_head()
    module = ex.mtp_detach_module()
    cut = ("heads", "trunk", "every depth")
    assert len({norm[c] for c in cut}) == 1
    assert norm["nothing"] != norm["trunk"]
    assert head["nothing"] == head["trunk"] == head["every depth"] != head["heads"]
    assert module["nothing"] == module["heads"] == module["trunk"] != module["every depth"]


def test_trap_25() -> None:
    """Three of four outputs have a token: 4/3 of the loss."""
    numbers = ex.empty_outputs()
    np.testing.assert_allclose(numbers["left_out"], 4 / 3 * numbers["counted"], rtol=1e-14)


def test_trap_26() -> None:
    """What the padding position computes changes one of 34 losses: less than one target more."""
    numbers = ex.left_padding()
    all_differ({name: numbers[name] for name in ("left out", "counted")})
    assert abs(numbers["counted, mean"] - numbers["counted"]) > 1e-4 * numbers["counted"]


def test_trap_27() -> None:
    all_differ(ex.rope_layout())


def test_trap_28() -> None:
    numbers = ex.biased_weights()
    all_differ(numbers)
    assert numbers["scores"] == ex.main()


def test_trap_29() -> None:
    all_differ(ex.softmax_ranking())


def test_trap_30() -> None:
    """19 and 2 targets, two parts: the sum of the means is twice their mean; every position
    counted, 21 of 40; and the right one is the model's own."""
    numbers = ex.main_in_parts()
    all_differ(numbers, 1e-2)
    output = ex.forward(ex.parameters(), ex.text(), ex.TINY, key_mask=ex.UNEVEN)[0]
    np.testing.assert_allclose(numbers["right"], float(np.asarray(output.main)), rtol=1e-14)
    np.testing.assert_allclose(numbers[ex.SUM], 2 * numbers[ex.MEANS], rtol=1e-15)
    np.testing.assert_allclose(numbers[ex.TWICE], numbers["right"] / 2, rtol=1e-15)
    padded = numbers["every position counted, padding too"]
    np.testing.assert_allclose(padded, numbers["right"] * 21 / 40, rtol=1e-14)


def test_trap_31() -> None:
    """18 and 1 targets of module 1, 19 and 2 of the main loss."""
    numbers = ex.mtp_in_parts()
    all_differ(numbers)
    by_main = numbers["divided by the main loss's count"]
    np.testing.assert_allclose(by_main, numbers["right"] * 19 / 21, rtol=1e-14)
    output = ex.forward(
        ex.parameters(), ex.text(), ex.convention(mtp_normaliser="valid"), key_mask=ex.UNEVEN
    )[0]
    share = ex.TINY.mtp_weight / ex.TINY.mtp_depth * float(output.mtp[0])
    np.testing.assert_allclose(numbers["right"], share, rtol=1e-14)


def test_trap_32() -> None:
    numbers = ex.balance_in_parts()
    all_differ(numbers)
    np.testing.assert_allclose(numbers[ex.SUM], 2 * numbers["right"], rtol=1e-15)
    all_differ(ex.statistics_of_part())
    whole = float(sum(ex.run().balance.values()))
    np.testing.assert_allclose(ex.statistics_of_part()["each sequence's"], whole, rtol=1e-14)


def test_trap_33() -> None:
    numbers = ex.token_mean_in_parts()
    all_differ(numbers)
    np.testing.assert_allclose(numbers["right"], ex.grpo(average="token"), rtol=1e-14)
    numbers = ex.output_mean_in_parts()
    all_differ(numbers)
    np.testing.assert_allclose(numbers["right"], ex.grpo(), rtol=1e-14)


def test_trap_34() -> None:
    """With a floor of 1e-4 the least number of E4M3 is 2⁻⁹ · 1e-4 / 448 = 4.4e-10, and 1e-11 less
    than half of it."""
    floor = ex.fp8_floor()
    assert floor["floor 0.0001"] == floor["floor 1e-12"] == 0
    assert isnan(floor["floor 0"])
    small = ex.fp8_small_gradient()
    assert small["floor 0.0001"] == 1
    assert 0.01 < small["floor 1e-12"] < 2**-4


def test_trap_35() -> None:
    """1.9 / 448 is 1.086 · 2⁻⁸: 1.9 comes back within its rounding from the power of two above, and
    as 448 of the lower ones else, 448 · 2⁻⁸ = 1.75 and as much rounded down."""
    numbers = ex.fp8_largest()
    np.testing.assert_allclose(numbers["float32"], 1.9, rtol=1e-7)
    assert numbers["ue8m0"] == 1.875
    assert numbers["rounded down"] == numbers["OCP's MX"] == 1.75
    errors = ex.fp8_scale_error()
    all_differ(errors, 1e-3)
    assert max(errors.values()) < 2**-4


def test_trap_36() -> None:
    """Each of 33 terms is cut off by at most 2⁻¹³ of a sum, in each of 4 steps of 32: within 128 by
    less than 33 · 2⁻¹³ = 0.4 %. Then 32 blocks and sums are cut off by 2⁻¹³ each: 0.8 % more."""
    numbers = ex.fp8_sums()
    assert numbers["float32"] < 1e-4
    all_differ(numbers)
    assert numbers["14 bits, each 128 terms"] < 0.4
    assert numbers["14 bits, each 128 terms"] < numbers["14 bits throughout"] < 0.4 + 0.8
    a, b = np.ones((1, 128), np.float32), np.ones((1, 128), np.float32)
    a[0, 0] = 2.0**-8
    sums = [ex.linear_forward(a, b, ex.Recipe(bits=bits))[0].item() for bits in (0, 14)]
    np.testing.assert_allclose(sums, [127 + 2.0**-8, 127], rtol=1e-6)


def test_trap_37() -> None:
    """Two roundings of one factor instead of one: √(3/2) times the error of two factors' one."""
    numbers = ex.fp8_weight_input()
    np.testing.assert_allclose(numbers["kept"] / numbers["exact"], 1.5**0.5, rtol=0.05)


def test_each_trap_has_its_test_and_numbers() -> None:
    assert len(TRAPS) == 37
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
    assert not {f.name for f in fields(Conventions)} - set(re.findall(r"\w+", named))


def test_words_find_traps() -> None:
    assert find("rope") == [7, 8, 20, 22, 27]
    assert find("MTP") == [1, 2, 3, 4, 23, 24, 31]
    assert 26 in find("padding")
    assert find("softmax gate") == [29]
    assert find("later ones are not") == [2, 4]  # a symptom's words
    assert find("accumulation") == [*find("micro-batch"), 36] == [30, 31, 32, 33, 36]
    assert find("ue8m0") == [35]
    assert find("quantum") == []


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
