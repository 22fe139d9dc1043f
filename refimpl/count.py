"""Parameters, KV cache, FLOPs and training cost of a model, each figure with the arithmetic that
makes it.

Sizes come from `parameter_shapes`; the only constants are published inputs (GPU-hours, tokens,
DeepSeek-67B's shape). A FLOP is a multiplication or an addition, so a product of [m, n] and [n, k]
has 2mnk; norms, softmax, RoPE and other elementwise work are left out. Sources: DeepSeek-V3
(2412.19437) table 1, sections 2.2 and 4.2; DeepSeek-V2 (2405.04434) section 3.2.3; Insights into
DeepSeek-V3 (2505.09343) table 2; README_WEIGHTS.md of deepseek-ai/DeepSeek-V3. Letters:
derivations/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, prod
from typing import NamedTuple

from .config import PRESETS, ModelConfig
from .errors import CouldNotRun
from .parameters import (
    EXPERTS,
    SHARED,
    attention_shapes,
    block_shapes,
    dense_names,
    is_buffer,
    network_names,
    parameter_shapes,
)

__all__ = ["Figure", "Line", "Section", "count"]

Number = int | float


class Figure:
    """A number that remembers how it was computed: ``(Figure(2) * 61 + 1) * 7168`` reads (2 × 61 +
    1) × 7,168."""

    def __init__(self, value: Number, text: str = "", binding: int = 3) -> None:
        self.value, self.binding = value, binding  # 1 a sum, 2 a product, 3 a number
        places = "" if isinstance(value, int) else ".6g" if value < 1e6 else ".0f"
        self.text = text or f"{value:,{places}}"

    def _join(self, sign: str, other: Figure, value: Number, left: int, right: int) -> Figure:
        """``left`` and ``right``: how tightly each operand must bind to go without parentheses."""
        pair = ((self, left), (other, right))
        return Figure(
            value,
            f" {sign} ".join(x.text if x.binding >= n else f"({x.text})" for x, n in pair),
            left,
        )

    def __add__(self, other: Number | Figure) -> Figure:
        return self._join("+", b := _figure(other), self.value + b.value, 1, 1)

    def __sub__(self, other: Number | Figure) -> Figure:
        return self._join("−", b := _figure(other), self.value - b.value, 1, 2)

    def __mul__(self, other: Number | Figure) -> Figure:
        b = _figure(other)
        if "1" in (self.text, b.text):  # once something is that thing
            return b if self.text == "1" else self
        return self._join("×", b, self.value * b.value, 2, 2)

    def __truediv__(self, other: Number | Figure) -> Figure:
        b = _figure(other)
        if b.text == "1":
            return self
        whole = (
            isinstance(self.value, int) and isinstance(b.value, int) and self.value % b.value == 0
        )
        return self._join("/", b, self.value // b.value if whole else self.value / b.value, 2, 3)


def _figure(x: Number | Figure) -> Figure:
    return x if isinstance(x, Figure) else Figure(x)


class Line(NamedTuple):
    """A number of the table: what it is, how it comes about, its value."""

    name: str
    arithmetic: str  # how the value comes about; empty for an input, or a figure of a table above
    value: Number
    unit: str

    @property
    def text(self) -> str:
        """The value in full, with its unit."""
        v, places = self.value, 0 if isinstance(self.value, int) or self.value >= 1000 else 2
        number = f"{v:.4e}" if v >= 1e13 else f"{v:,.{places}f}"
        return f"${number}" if self.unit == "$" else f"{number} {self.unit}".rstrip()

    @property
    def short(self) -> str:
        """Rounded to three digits behind the point: 671.026B."""
        for scale, letter in (
            (1e12, "T"),
            (1e9, "G" if self.unit in ("FLOP", "B") else "B"),
            (1e6, "M"),
        ):
            if scale <= self.value < 1e15:
                return f"{'$' * (self.unit == '$')}{self.value / scale:.3f}{letter}"
        return ""


@dataclass
class Section:
    """One table: its lines, and notes on what they are compared with."""

    title: str
    unit: str = ""
    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, figure: Number | Figure, unit: str | None = None) -> Number:
        """Append a line and return its value."""
        f, unit = _figure(figure), self.unit if unit is None else unit
        value = int(f.value) if f.value == int(f.value) and f.value < 2**53 else f.value
        self.lines.append(Line(name, f.text if f.binding < 3 else "", value, unit))
        return value

    def add_sum(self, name: str, lines: int) -> Number:
        """Append the sum of the last ``lines`` lines."""
        value = sum(line.value for line in self.lines[-lines:])
        self.lines.append(Line(name, f"sum of the {lines} above", value, self.unit))
        return value


class Published(NamedTuple):
    """What a report says and arithmetic cannot give."""

    active: str  # how the printed number of active parameters relates to ours
    tokens: float  # trillions, of pre-training
    context: int  # of most of pre-training
    hours: int = 0  # H800 hours for a trillion tokens; 0: not published


PUBLISHED = {
    "v3": Published(
        'The report prints "37B", README_WEIGHTS "36.7B (including 0.9B for Embedding and '
        '0.9B for the output Head)". With the head alone it is 36.63B, which rounds to 37B; '
        "with the embedding too it is 37.55B, which rounds to 38B. So 37B counts the head and "
        'not the embedding, a lookup of one row; 36.7B is neither. The MTP module\'s "2.4B" '
        'leaves out eh_proj, as its "11.5B" does.',
        tokens=14.8,
        context=4096,
        hours=180_000,
    ),
    "v2": Published(
        'The report\'s "21B" fits either sum: 20.85B with the head, 21.38B with head and '
        "embedding.",
        tokens=8.1,
        context=4096,
        hours=172_800,
    ),
    "v2-lite": Published(
        'The report\'s "2.4B" is 2.45B, with the head and without the embedding.', 5.7, 4096
    ),
    "moonlight-16b": Published(
        "The report's \"15.29B, 2.24B active\" leave out embedding and head; the name's 16B-A3B "
        "does not.",
        5.7,
        8192,
    ),
}
FP8_FILES = {  # the released files with a scale per tile, and how their sizes relate to ours
    "v3": 'README_WEIGHTS\' "11.5B unique parameters" leave out eh_proj. The README\'s "14B" is '
    "685 − 671; the file has 13.46B, with the embedding and the head that main model and module "
    "share in memory. 685B counts the scales of FP8 weights too, one per tile of 128 × 128: "
    "{file}.",
    "kimi-k2": "The biases count, and one scale per tile of 128 × 128. The released file has 61 × "
    "56 numbers more (rotary frequencies, which follow from the config), and 1,029,173,256,720 "
    "bytes: 1 per FP8 weight, 4 per scale and bias, 2 for the rest.",
}
V3_STAGES = {"context extension": 119_000, "post-training": 5_000}  # H800 hours, table 1
DOLLARS, CLUSTER = 2, 2048  # an H800 hour's price, as the report assumes; its number of H800s
PEAK = {
    "BF16": 989.4,
    "FP8": 1978.9,
}  # dense TFLOP/s of an H100 SXM, NVIDIA's figures; an H800's are the same
DENSE_67B = {"layers": 95, "kv_heads": 8, "head": 128}  # DeepSeek-67B, grouped-query attention
DENSE_67B_HOURS = 300_600  # H800 hours for a trillion tokens, V2 report


class Parts(NamedTuple):
    """Parameters of each kind of part; 0 where the model has none."""

    mla: int
    mla_matrices: int  # without the latent norms
    dense: int  # one dense FFN
    expert: int
    gate: int
    moe_layers: int  # of the main model
    embedding: int
    eh_proj: int


def count(config: ModelConfig, *, length: int = 4096) -> list[Section]:
    """Every table for ``config``; FLOPs are of sequences of ``length`` tokens. CouldNotRun if it is
    too short."""
    check_length(config, length)
    known = published_as(config)
    parts, sections = _parameters(config, known)
    sections += [_active(config, parts, known), _cache(config)]
    sections += [_against_67b(known)] if known in ("v2", "v3") else []
    sections += _flops(config, parts, length, known)
    return [*sections, _training(config, parts, known)] if known else sections


def check_length(config: ModelConfig, length: int) -> None:
    """CouldNotRun unless sequences of ``length`` tokens can be counted: each MTP module has one."""
    if not config.mtp_depth < length <= 10**9:
        raise CouldNotRun(
            f"must lie in {config.mtp_depth + 1:,}…{10**9:,}, got {length:,}", argument="length"
        )


def published_as(config: ModelConfig) -> str:
    """The key of `PUBLISHED` for a model of these tensors, or nothing."""
    shapes = parameter_shapes(config)
    same = (
        key
        for key in PUBLISHED
        if parameter_shapes(PRESETS[key]) == shapes and PRESETS[key].top_k == config.top_k
    )
    return next(same, "")


def _parameters(c: ModelConfig, known: str) -> tuple[Parts, list[Section]]:
    """From the tensors of one layer to the main model, the MTP modules, and the file."""
    shapes = parameter_shapes(c)
    d = c.width
    deep = c.mtp_depth
    one, ffn = (
        Section("Parameters of one attention (MLA)"),
        Section("Parameters of one feed-forward layer"),
    )
    tensors = attention_shapes(c)
    for name, (rows, *columns) in tensors.items():
        product = Figure(rows) * columns[0] if columns else Figure(rows)
        one.add(name.removeprefix("self_attn.").removesuffix(".weight"), product)
    mla = int(one.add_sum("one attention", len(tensors)))
    dense = expert = gate = moe = 0
    if c.dense_layers:
        hidden, _ = block_shapes(c, 0)[dense_names()[0]]
        dense = int(ffn.add("dense FFN: gate, up, down", Figure(3) * hidden * d))
    if c.dense_layers < c.layers + deep:
        experts, hidden, _ = block_shapes(c, c.dense_layers)[network_names(EXPERTS)[0]]
        expert = int(ffn.add("one expert: gate, up, down", Figure(3) * hidden * d))
        gate = int(ffn.add("gate (router)", Figure(experts) * d))
        moe = int(
            ffn.add(
                "MoE layer: routed + shared, gate",
                (Figure(experts) + c.shared_experts) * expert + gate,
            )
        )

    main, moe_layers = Section("Parameters of the main model"), c.layers - c.dense_layers
    embedding = int(main.add("embedding", Figure(c.vocabulary) * d))
    main.add("attention", Figure(c.layers) * mla)
    main.add("dense FFNs", Figure(c.dense_layers) * dense)
    main.add("MoE layers", Figure(moe_layers) * moe)
    main.add("norms: two a layer, one final", (Figure(2) * c.layers + 1) * d)
    tables = 1 if c.tied else 2
    main.add(
        "output head (tied: the embedding)" if c.tied else "output head",
        Figure(tables - 1) * embedding,
    )
    total = main.add_sum("main model", 6)
    main.add("… without embedding and head", Figure(total) - Figure(tables) * embedding)
    biases = any(map(is_buffer, shapes))
    if biases:
        main.add("apart: gate biases (buffers)", Figure(moe_layers) * c.experts)
    sections, eh_proj = [one, ffn, main], 2 * d * d
    if deep:
        mtp = Section("Parameters of multi-token prediction (MTP)")
        for name, figure in {
            "norms: two in, two inside, one out": Figure(5) * d,
            "eh_proj": Figure(d) * (Figure(2) * d),
            "attention": Figure(mla),
            "MoE layer": Figure(moe),
        }.items():
            mtp.add(name, figure)
        unique = mtp.add("unique to MTP", Figure(deep) * mtp.add_sum("one module", 4))
        mtp.add("… without eh_proj", Figure(unique) - Figure(deep) * eh_proj)
        copies = mtp.add(
            "… with copies of embedding and head",
            Figure(unique) + Figure(deep) * tables * embedding,
        )
        file = Figure(total) + copies
        whole = mtp.add(
            "whole file: main, MTP, biases",
            file + (Figure(moe_layers) + deep) * c.experts if biases else file,
        )
        _released(mtp, c, whole)
        sections.append(mtp)
    else:
        _released(main, c, Figure(total) + Figure(moe_layers) * c.experts)
    return Parts(
        mla, _matrices(tensors), dense, expert, gate, moe_layers, embedding, eh_proj
    ), sections


def _released(section: Section, c: ModelConfig, whole: Number | Figure) -> None:
    """What a file in FP8 has in addition to the ``whole``, if the model is one of `FP8_FILES`."""
    shapes = parameter_shapes(c)
    for key, note in FP8_FILES.items():
        if parameter_shapes(PRESETS[key]) == shapes:
            scales = section.add("apart: scales of its FP8 weights", _scales(c))
            file = section.add("… with them", _figure(whole) + scales)
            section.notes.append(note.format(file=f"{file:,}"))


def _scales(c: ModelConfig) -> int:
    """Of DeepSeek's FP8 files: one per tile of 128 × 128 of the projections of attention and
    networks."""
    networks = [*dense_names(), *network_names(EXPERTS), *network_names(SHARED)]
    names = {*attention_shapes(c), *networks}
    return sum(
        prod(shape[:-2]) * ceil(shape[-2] / 128) * ceil(shape[-1] / 128)
        for layer in range(c.layers + c.mtp_depth)
        for name, shape in block_shapes(c, layer).items()
        if name in names and len(shape) > 1
    )


def _matrices(tensors: dict[str, tuple[int, ...]]) -> int:
    """Parameters that multiply: the norms' weights left out."""
    return sum(prod(shape) for shape in tensors.values() if len(shape) > 1)


def _active(c: ModelConfig, p: Parts, known: str) -> Section:
    """Parameters that one token meets."""
    active, experts = (
        Section("Active parameters: what one token meets"),
        Figure(c.top_k) + c.shared_experts,
    )
    active.add("attention", Figure(c.layers) * p.mla)
    active.add("dense FFNs", Figure(c.dense_layers) * p.dense)
    active.add(
        "MoE layers: top-k + shared, gate", Figure(p.moe_layers) * (experts * p.expert + p.gate)
    )
    active.add("norms", (Figure(2) * c.layers + 1) * c.width)
    head = active.add("… + head", Figure(active.add_sum("layers", 4)) + p.embedding)
    if not c.tied:
        active.add("… + head + embedding", Figure(head) + p.embedding)
    if c.mtp_depth:
        module = (
            Figure(p.mla)
            + (experts * p.expert + p.gate)
            + Figure(5) * c.width
            + Figure(2) * p.embedding
        )
        active.add("an MTP module with both, no eh_proj", module)
    active.notes += [PUBLISHED[known].active] if known else []
    return active


def _cache(c: ModelConfig) -> Section:
    """The latent and the rotated key, against keys and values of every head."""
    cache = Section("KV cache of a token, 2 bytes a number (bfloat16)", "B")
    latent = cache.add(
        "MLA, a layer: latent + rotated key", Figure(c.kv_latent) + c.rope, "numbers"
    )
    heads = cache.add(
        "MHA, a layer: keys N, values V wide",
        Figure(c.heads) * (Figure(c.nope) + c.value),
        "numbers",
    )
    cache.add("MLA", Figure(latent) * c.layers * 2)
    cache.add("MHA of the same model", Figure(heads) * c.layers * 2)
    cache.add("saved against MHA", Figure(100) * (Figure(1) - Figure(latent) / heads), "%")
    return cache


def _against_67b(known: str) -> Section:
    """The "93.3 %" of the V2 report, and what is left of it when both caches have the same
    precision."""
    section, (layers, heads, head) = (
        Section('KV cache: the "93.3 %" of the V2 report', "B"),
        DENSE_67B.values(),
    )
    dense = section.add(
        "DeepSeek-67B: GQA, 16 bits a number", Figure(2) * heads * head * layers * 2
    )
    for key, bits in [("v2", 6), ("v2", 16), ("v3", 16)][: 2 + (known == "v3")]:
        c = PRESETS[key]
        cache = section.add(
            f"{key.upper()}: MLA, {bits} bits", (Figure(c.kv_latent) + c.rope) * c.layers * bits / 8
        )
        section.add("saved", Figure(100) * (Figure(1) - Figure(cache) / dense), "%")
    section.notes.append(
        "V2's cache is deployed at 6 bits a number and compared with 67B's at 16: 93.34 % are "
        "MLA and quantisation together. MLA alone, at equal precision, saves the smaller "
        "shares; 67B has 8 key-value heads, not 128."
    )
    return section


def _flops(c: ModelConfig, p: Parts, length: int, known: str) -> list[Section]:
    """Forward and backward of training or prefill, a token, averaged over a sequence."""
    wide, active = c.nope + c.rope, (Figure(c.top_k) + c.shared_experts) * p.expert
    forward = Section(f"Forward FLOPs a token, at length {length:,}", "FLOP")
    backward = Section(f"Backward FLOPs a token, at length {length:,}", "FLOP")

    def attention(layers: int, width: Figure, tokens: int) -> Figure:
        return Figure(2) * layers * c.heads * width * (Figure(tokens) + 1) / 2

    for name, figure in {
        "attention's matrices": Figure(2) * c.layers * p.mla_matrices,
        "dense FFNs": Figure(2) * c.dense_layers * p.dense,
        "experts: top-k + shared": Figure(2) * p.moe_layers * active,
        "gates": Figure(2) * p.moe_layers * p.gate,
        "output head": Figure(2) * p.embedding,
    }.items():
        backward.add(name, Figure(2) * forward.add(name, figure))
    once, twice = Figure(wide) + c.value, Figure(3) * wide + Figure(2) * c.value
    naive = forward.add("attention, naive: q·k, p·v", attention(c.layers, once, length))
    backward.add("attention, naive, q·k recomputed", attention(c.layers, twice, length))
    main, *_ = both = [section.add_sum("main model", 6) for section in (forward, backward)]
    if c.mtp_depth:
        module = p.eh_proj + p.mla_matrices + int(active.value) + p.gate + p.embedding
        for k in range(1, c.mtp_depth + 1):
            seen, name = length - k, f"MTP module {k}, with the head"
            forward.add(name, (Figure(2) * module + attention(1, once, seen)) * seen / length)
            backward.add(name, (Figure(4) * module + attention(1, twice, seen)) * seen / length)
        both = [section.add_sum("with MTP", 1 + c.mtp_depth) for section in (forward, backward)]
        forward.notes.append(
            f"A token meets {module:,} weights in an MTP module's matrices: eh_proj, "
            "attention, experts, gate, and the head once more. Module k runs at length − k "
            "positions."
        )
    backward.add("forward + backward", Figure(both[0]) + both[1])
    backward.add("apart: both, main, no recomputation", Figure(3) * main)
    absorbed = attention(c.layers, Figure(2) * c.kv_latent + c.rope, length)
    forward.add("apart: attention, absorbed", absorbed)
    forward.add("apart: absorbed over naive", Figure(absorbed.value) / naive, "×")
    forward.notes.append(
        "Causal, counted exactly: query t sees t keys, (length + 1) / 2 on average. The sums "
        "hold the naive form. Absorbed has the same matrices, but works as wide as the "
        "latent: it is for decoding, where naive would expand the cached latents anew."
    )
    backward.notes.append(
        "The backward of a matrix product is two of its size, for input and weight. "
        "Attention's is q·k once more (flash attention keeps no probabilities) and dv, dp, "
        "dq, dk: five products for two, 2.5× at equal widths and "
        f"{twice.value / once.value:.3g}× here, where queries and keys are N + R wide and "
        "values V. With them kept, 2×."
    )
    if known == "v3" and length == 4096:
        backward.notes.append('The last line is the "250 GFLOPS/token" of 2505.09343, without MTP.')
    return [forward, backward]


def _training(c: ModelConfig, p: Parts, known: str) -> Section:
    """GPU-hours and dollars where they are published, and the FLOP/s that they imply."""
    report, section = PUBLISHED[known], Section("Training", "h")
    if report.hours:
        section.add("H800 hours, 10¹² tokens, published", report.hours)
        section.add(
            f"days for them on {CLUSTER:,} H800s", Figure(report.hours) / CLUSTER / 24, "days"
        )
        hours = section.add(
            f"pre-training, {report.tokens} × 10¹² tokens", Figure(report.hours) * report.tokens
        )
    if known == "v3":
        stages = {"pre-training": hours} | {
            name: section.add(f"{name}, published", n) for name, n in V3_STAGES.items()
        }
        whole = section.add_sum("in all", 3)
        for name, n in [*stages.items(), ("in all", whole)]:
            section.add(f"{name}, at ${DOLLARS} an hour", Figure(n) * DOLLARS, "$")
    if known == "v2":
        saved = Figure(100) * (Figure(1) - Figure(report.hours) / DENSE_67B_HOURS)
        section.add("hours saved against DeepSeek-67B", saved, "%")
    tokens, step = (
        round(report.tokens * 10**12),
        _flops(c, p, report.context, known)[1].lines[-1].value,
    )
    section.add(f"no recomputation, at length {report.context:,}", step, "FLOP")
    section.add("pre-training", Figure(step) * tokens, "FLOP")
    if not report.hours:
        section.notes.append(f"The report gives {report.tokens} × 10¹² tokens, and no GPU-hours.")
        return section
    speed = section.add(
        "implied: tokens a GPU and second", Figure(tokens) / (Figure(hours) * 3600), ""
    )
    rate = section.add("implied: rate of a GPU", Figure(step) * speed / 10**12, "TFLOP/s")
    for name in ("BF16", "FP8")[: 1 + (known == "v3")]:
        section.add(f"implied: of its dense {name} peak", Figure(100) * rate / PEAK[name], "%")
    section.notes.append(
        "What is implied is computed from the lines above, not published: the hours are "
        "rounded and hold all that pre-training did, the FLOPs only the main model's matrix "
        "products, counted once."
    )
    return section
