"""``refimpl memory``."""

from __future__ import annotations

import typer

from ..memory import attention_memory, head_memory
from .app import app, console


@app.command()
def memory() -> None:
    """Show the peak memory of flash attention, and of the fused output head and cross-entropy, against their bounds."""
    out, holds = console(), True
    out.print("flash attention, forward + backward, above the inputs (4 heads, widths 48/32, block 128, float32)")
    first = 0
    for a in attention_memory():
        first = first or a.peak
        share = a.peak / a.probabilities
        out.print(
            f"  T {a.length:>5}: {a.peak / 2**20:7.2f} MiB, {a.peak / first:5.2f} x T 1024, "
            f"{100 * share:6.2f} % of the probabilities' {a.probabilities / 2**20:.0f} MiB"
        )
        holds &= a.peak / first <= 4.6 and (a.length < 4096 or share <= 1 / 8)
    out.print("  bounds: 4.6 x from T 1024 to 4096; 12.5 % at T 4096")
    out.print("output head + cross-entropy, forward + backward, beyond h, W, dh, dW (vocabulary 129280, float32)")
    first = 0
    for h in head_memory():
        first = first or h.peak
        out.print(
            f"  T {h.length:>5}: {h.peak / 2**20:7.2f} MiB, {h.peak / first:5.2f} x T 1024, "
            f"{100 * h.peak / h.logits:6.2f} % of the logits' {h.logits / 2**20:.0f} MiB"
        )
        holds &= h.peak <= 0.1 * h.logits and h.peak <= 1.05 * first
    out.print("  bounds: 10 % of the logits; flat in T (within 5 %)")
    out.print("holds" if holds else "DOES NOT HOLD")
    raise typer.Exit(int(not holds))
