"""Formulas as MathML, made at build time: LaTeX by latex2mathml, and after it what a browser needs.

A formula that cannot be converted, or that is wider than the column, is a warning, and a warning
ends the build. `\\tag{linear.2}` becomes the equation's number and its anchor, `eq-linear.2`.
"""

from __future__ import annotations

import re
import shutil
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import latex2mathml.converter
import ziamath
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

__all__ = ["Formula", "formula", "setup", "width"]

COLUMN = 700  # pixels; the column has 742, and Chromium's layout is up to 7 % wider than ziamath's
SHORT = 80  # characters of LaTeX that fit in any case
TAG = re.compile(r"\\tag\{([^}]*)\}")
REWRITTEN = (  # LaTeX that latex2mathml does not know, as LaTeX that it knows
    (re.compile(r"\{aligned\}"), "{align*}"),
    (re.compile(r"(\\begin\{cases\}|\\\\)\s*\["), r"\1 {}["),  # a bracket, not an option
)
NAMESPACE = "http://www.w3.org/1998/Math/MathML"
FENCES = set("()[]{}|‖⌊⌋⌈⌉⟨⟩")
OPENING = set("([{⌊⌈⟨")
ENVIRONMENTS = {"align*", "cases", "pmatrix"}
CHILDREN = {"mfrac": 2, "mroot": 2, "msub": 2, "msup": 2, "msubsup": 3, "mover": 2, "munder": 2}
LETTERS = set("∞⊤∂…")  # that latex2mathml takes for operators
SIGNS = set(";⟺")  # and the other way round
SCRIPTS = ("msub", "msup", "msubsup", "munder", "munderover", "mover")
OPERATORS = set("=←+,(⋅≤≥<>[≈∼∝→")
ALPHABETS = {"sans-serif": 0x1D5A0, "double-struck": 0x1D538, "script": 0x1D49C}  # the letter A
ELSEWHERE = {  # letters that Unicode had before it had the alphabet
    "double-struck": dict(zip("CHNPQRZ", "ℂℍℕℙℚℝℤ", strict=True)),
    "script": dict(zip("BEFHILMR", "ℬℰℱℋℐℒℳℛ", strict=True)),
}
THIN = "0.1667em"
LOG = logging.getLogger(__name__)


class Formula(NamedTuple):
    mathml: str
    tag: str | None  # of the equation, linear.2


def formula(latex: str, display: bool = False) -> Formula:
    """LaTeX as MathML, and the equation's tag.

    Raises:
        ValueError: what latex2mathml does not understand.
    """
    found = TAG.search(latex)
    latex = TAG.sub("", latex).strip().strip("`")  # GitHub's $`x`$, where $x$ would be emphasis
    for pattern, known in REWRITTEN:
        latex = pattern.sub(known, latex)
    try:
        text = latex2mathml.converter.convert(latex, display="block" if display else "inline")
        tree = ElementTree.fromstring(text.replace("\\_", "_").replace(f' xmlns="{NAMESPACE}"', ""))
    except Exception as error:  # latex2mathml raises a class of its own per mistake
        raise ValueError(f"not converted: {error!r}") from error
    for row in list(tree.iter()):
        _join_letters(row)
        _pair_bars(row)
        _sign_numbers(row)
        _space_names(row)
    for element in list(tree.iter()):
        _as_browsers_want(element)
        _lift_prime(element)
    mathml = ElementTree.tostring(tree, encoding="unicode")
    if fault := _fault(latex, tree):
        raise ValueError(f"not converted: {fault}: {mathml}")
    return Formula(mathml, found and found[1].replace("\\_", "_"))


def _fault(latex: str, tree: ElementTree.Element) -> str | None:
    """What latex2mathml lets pass, and a browser would show wrong."""
    bare = re.sub(r"\\[{}]", "", latex)
    if bare.count("{") != bare.count("}"):
        return "a brace is open"
    if unknown := set(re.findall(r"\\begin\{(.*?)\}", latex)) - ENVIRONMENTS:
        return f"no environment {', '.join(unknown)}"
    for element in tree.iter():
        if "\\" in (element.text or "") or element.tag == "merror":
            return f"unknown: {element.text}"
        if len(element) != CHILDREN.get(element.tag, len(element)):
            return f"{element.tag} of {len(element)}"
        if "linebreak" in element.attrib:
            return "a line breaks outside an environment"
    return None


def _core(element: ElementTree.Element) -> ElementTree.Element:
    """The operator under its indices."""
    while element.tag in SCRIPTS:
        element = element[0]
    return element


def _join_letters(row: ElementTree.Element) -> None:
    """`\\mathrm{softmax}` is one word, not seven letters."""
    upright = [child.tag == "mi" and child.get("mathvariant") == "normal" for child in row]
    if len(row) > 1 and all(upright):
        word = ElementTree.Element("mi")
        word.text = "".join(child.text or "" for child in row)
        row[:] = [word]


def _pair_bars(row: ElementTree.Element) -> None:
    """An even number of bars in a row opens and closes; a single one stands between."""
    cores = [_core(child) for child in row]
    for bar in "|‖":
        bars = [core for core in cores if core.text == bar]
        for i, core in enumerate(bars if len(bars) % 2 == 0 else []):
            core.tag = "mo"
            core.set("form", "postfix" if i % 2 else "prefix")


def _sign_numbers(row: ElementTree.Element) -> None:
    """A minus after another operator is a sign: = −x."""
    cores = [_core(child) for child in row]
    for before, core in pairwise(cores):
        if core.text == "−" and before.tag == "mo" and before.text in OPERATORS:
            core.set("form", "prefix")


def _space_names(row: ElementTree.Element) -> None:
    """ln x has a thin space, ln (x) has none, and neither at the beginning of a row."""
    cores = [_core(child) for child in row]
    for i, (child, core) in enumerate(zip(row, cores, strict=True)):
        if core.tag in ("mi", "mo") and len(core.text or "") > 1 and (core.text or "").isalpha():
            before, after = cores[i - 1 : i], cores[i + 1 : i + 2]
            core.tag = "mo"
            core.set("lspace", THIN if before and before[0].tag != "mo" else "0")
            core.set("rspace", THIN if after and after[0].text not in FENCES else "0")
            if child.tag == "msub" and core.text in ("max", "min"):
                child.tag = "munder"
                core.set("movablelimits", "true")


def _as_browsers_want(element: ElementTree.Element) -> None:
    """MathML Core has no alphabets but Unicode's, accents that say so, and fences that stretch
    unless told not to."""
    variant = element.get("mathvariant", "")
    if variant in ALPHABETS and len(text := element.text or "") == 1 and text.isupper():
        letter = ELSEWHERE.get(variant, {}).get(text)
        element.text = letter or chr(ALPHABETS[variant] + ord(text) - ord("A"))
        del element.attrib["mathvariant"]
    if element.tag in ("msup", "msub", "msubsup") and "minsize" in element[0].attrib:
        row = ElementTree.Element("mrow")  # in which a bracket grows; as a base it would not
        row.append(element[0])
        element[0] = row
    if element.tag == "mover" and len(element) == 2 and element[1].tag == "mo":
        element.set("accent", "true")
        if element[1].text == "―":  # overline
            element[1].text = "‾"
            element[1].set("stretchy", "true")
        elif len(element[0]) == 0:
            element[1].set("stretchy", "false")
    if element.tag == "mo" and "minsize" in element.attrib:
        form = "prefix" if element.text in OPENING else "postfix"
        element.attrib |= {"stretchy": "true", "form": form}
    if element.tag in ("mi", "mo") and element.text in LETTERS | SIGNS:
        element.tag = "mi" if element.text in LETTERS else "mo"
    if element.tag == "mo" and element.text == "/":
        element.attrib |= {"lspace": "0", "rspace": "0"}
    if element.tag == "mo" and element.text in FENCES and "minsize" not in element.attrib:
        if element.get("stretchy") is None:
            element.set("stretchy", "false")


def _lift_prime(element: ElementTree.Element) -> None:
    """A prime is raised already: as an index it would be raised twice, and small."""
    if element.tag in ("msup", "msubsup") and element[-1].text == "′":
        base = ElementTree.Element("mrow")
        base.extend([element[0], ElementTree.Element("mi")])
        base[1].text = "′"
        index = list(element[1:-1])
        element[:] = [base, *index]
        element.tag = "msub" if index else "mrow"


def width(found: Formula) -> float:
    """Pixels that a display and its number take at 16 pixels per em, by ziamath's layout in STIX
    Two Math."""
    number = 8 * len(found.tag) + 32 if found.tag else 0
    return float(ziamath.Math(found.mathml, size=16).getsize()[0]) + number


def _converted(translator: HTML5Translator, node: nodes.Node, display: bool) -> Formula:
    try:
        found = formula(node.astext(), display)
        if display and len(node.astext()) > SHORT and (wide := width(found)) > COLUMN:
            LOG.warning("%.0f of %d pixels wide: %s", wide, COLUMN, node.astext(), location=node)
    except ValueError as error:
        LOG.warning("%s: %s", node.astext(), error, location=node)
        return Formula(f"<code>{escape(node.astext())}</code>", None)
    return found


def inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(_converted(translator, node, display=False).mathml)
    raise nodes.SkipNode


def block(translator: HTML5Translator, node: nodes.math_block) -> None:
    mathml, tag = _converted(translator, node, display=True)
    anchor = f' id="eq-{tag}"' if tag else ""
    number = f'<a class="eqno" href="#eq-{tag}">({tag})</a>' if tag else ""
    translator.body.append(f'<div class="display"{anchor}><div>{mathml}</div>{number}</div>\n')
    raise nodes.SkipNode


def add_font(app: Sphinx, error: Exception | None) -> None:
    """The font of ziamath, so that a reader needs none: STIX Two Math (SIL Open Font License)."""
    if error is None and app.builder.format == "html":
        font = Path(ziamath.__file__).parent / "fonts" / "STIXTwoMath-Regular.ttf"
        shutil.copy(font, Path(app.outdir) / "_static")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    app.connect("build-finished", add_font)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
