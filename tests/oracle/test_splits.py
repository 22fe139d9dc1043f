"""torch's autograd on split batches: micro-batches of rows by transformers' own count, pieces of
sequences by its cache of keys, each with parameters of its own."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

WHY = "the oracle needs torch and transformers: make oracle"
torch = pytest.importorskip("torch", reason=WHY)
pytest.importorskip("transformers", reason=WHY)

from torch.nn.functional import cross_entropy
from transformers import DynamicCache, MixtralConfig, MixtralForCausalLM, Trainer

from refimpl.grads.split import Split, rules, split_batch, term_counts, term_gradients
from refimpl.model import backward, forward
from refimpl.splits import run_parts

from golden.checkpoint_values import GRADIENT, read_checkpoint, relative_error
from oracle.hugging_face import Routing, build, build_mtp, float64, gradients, our_names
from oracle.test_hugging_face import SMALL, balance_loss, mtp_logits, mtp_name

TOKENS = np.random.default_rng(7).integers(0, SMALL["vocab_size"], (5, 9))
REAL = np.arange(9) < np.array([[9], [4], [7], [3], [6]])
SPLIT = "rows=1+3+1"  # of 8, 3 + 6 + 2 and 5 targets
MEANS = "the mean of the parts' means"
Run = tuple[float, dict[str, np.ndarray]]  # a loss and its gradients


def summed(runs: list[Run]) -> Run:
    return sum(loss for loss, _ in runs), {
        name: sum((grads[name] for _, grads in runs), np.zeros(())) for name in runs[0][1]
    }


def weighted(found: dict[str, list[Run]], factors: dict[str, list[float]]) -> Run:
    """Σ c · (loss, gradients) over terms and parts."""
    return summed(
        [
            (c * loss, {name: c * g for name, g in grads.items()})
            for term, each in factors.items()
            for c, (loss, grads) in zip(each, found[term], strict=True)
        ]
    )


def error(ours: Run, theirs: Run) -> float:
    """The worst, of the loss or of a gradient, relative to its largest value."""
    assert ours[1].keys() == theirs[1].keys()
    of_grads = (relative_error(ours[1][name], g) for name, g in theirs[1].items())
    return max(relative_error(ours[0], theirs[0]), *of_grads)


def factors(split: Split, config: Any, rule: str, *only: str) -> dict[str, list[float]]:
    """The factors of ``rule`` for the terms ``only``, the right ones for all others."""
    return {
        term: rules(term, count, split.ranks)[rule if term in only else "right"]
        for term, count in term_counts(split, config).items()
        if term != "balance_of_part"
    }


def without(grads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All but those of the projections that expand the latents."""
    return {name: g for name, g in grads.items() if "kv_b_proj" not in name}


def their_count(batches: list[dict[str, Any]]) -> Any:
    """`num_items_in_batch` of the micro-batches, by transformers' Trainer."""
    one = lambda: 1  # noqa: E731
    trainer = SimpleNamespace(
        model_accepts_loss_kwargs=True,
        compute_loss_func=None,
        _loss_shifts_labels=True,
        args=SimpleNamespace(average_tokens_across_devices=True, world_size=1, n_gpu=1),
        get_tp_size=one,
        get_cp_size=one,
        get_sp_size=one,
    )
    return Trainer._get_num_items_in_batch(trainer, batches, torch.device("cpu"))


def test_micro_batches_by_num_items_in_batch(tmp_path: Path) -> None:
    """Row 30: with the count of all micro-batches transformers accumulates the gradient of the
    whole; without, the mean of means, which is another by what `rules` say."""
    with float64():
        model = build("v3", SMALL, 3, tmp_path)
    config, params = read_checkpoint(tmp_path)
    arrays = {"tokens": TOKENS, "key_mask": REAL}
    split = split_batch(SPLIT, arrays, config)
    batches = [
        {
            "input_ids": torch.tensor(part.arrays["tokens"]),
            "attention_mask": torch.tensor(part.arrays["key_mask"]),
            "labels": torch.tensor(np.where(part.arrays["key_mask"], part.arrays["tokens"], -100)),
        }
        for part in split.parts
    ]
    count = their_count(batches)
    assert count == 8 + 3 + 6 + 2 + 5

    def accumulated(parts: list[dict[str, Any]], divisor: float, **how: Any) -> Run:
        model.zero_grad()
        with float64():
            losses = [model(**part, use_cache=False, **how).loss / divisor for part in parts]
            for loss in losses:
                loss.backward()
        return sum(loss.item() for loss in losses), gradients(model)

    right = accumulated(batches, 1, num_items_in_batch=count)
    output, saved = forward(params, config=config, **arrays)
    whole = float(output.loss), backward(saved)
    parts = run_parts(params, split.parts, config)
    assert error(whole, right) <= GRADIENT
    assert error(summed([(float(o.loss), grads) for o, grads in parts]), right) <= GRADIENT

    means = accumulated(batches, len(batches))
    found = term_gradients(params, split, config)
    assert error(weighted(found, factors(split, config, MEANS, "main")), means) <= GRADIENT
    assert error(whole, means) > 0.05


def test_mixtral_s_balance_loss() -> None:
    """Row 32: of all tokens of a micro-batch, and not divided by the number of micro-batches where
    the main loss is divided by the count of all."""
    settings = {"vocab_size": 31, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1}
    settings |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    config = MixtralConfig(**settings, output_router_logits=True, router_aux_loss_coef=1.0)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).double().eval()

    def added(rows: np.ndarray) -> float:
        """To the main loss, which is divided by 16 targets."""
        given = {"input_ids": torch.tensor(rows), "labels": torch.tensor(rows)}
        with torch.no_grad():
            output = model(**given, num_items_in_batch=16)
            bare = model(**given, num_items_in_batch=16, output_router_logits=False)
        assert (output.loss - bare.loss).item() == pytest.approx(output.aux_loss.item(), rel=1e-6)
        return output.aux_loss.item()

    both, alone = added(TOKENS[:2]), [added(TOKENS[n : n + 1]) for n in range(2)]
    assert sum(alone) == pytest.approx(2 * both, rel=0.1)
    assert np.mean(alone) != pytest.approx(both, rel=1e-4)


def test_mtp_and_balance_loss_on_rows(tmp_path: Path) -> None:
    """The sum over micro-batches, each term divided by its own count of the whole, padding left
    out; and the mean of the parts' means of each term alone."""
    with float64():
        model = build("v3", SMALL, 3, tmp_path)
        modules = build_mtp(model, 2, 4)
    config, params = read_checkpoint(tmp_path)
    conventions = replace(config.conventions, mtp_normaliser="valid")
    config = replace(
        config, mtp_depth=2, mtp_weight=0.3, balance_weight=0.05, conventions=conventions
    )
    own = {n: t for n, t in modules.named_parameters() if n.startswith("layers.")}
    biases = {n: t for n, t in modules.named_buffers() if n.endswith("e_score_correction_bias")}
    hidden = SMALL["moe_intermediate_size"]
    later = {mtp_name(n, config.layers): t for n, t in (own | biases).items()}
    params |= our_names(later, hidden)
    split = split_batch(SPLIT, {"tokens": TOKENS, "key_mask": REAL}, config)
    counts = term_counts(split, config)

    def part_terms(rows: np.ndarray) -> dict[str, Any]:
        """Of each term, the undivided sum over these rows, one by one so that none is padded."""
        total: dict[str, Any] = dict.fromkeys(["main", "mtp.1", "mtp.2", "balance"], 0.0)
        for row in rows:
            ids = torch.tensor(TOKENS[row : row + 1, : REAL[row].sum()])
            mains, modules_routing = Routing(model), Routing(modules)
            with float64():
                state = model.model(ids, use_cache=False).last_hidden_state
                logits = [model.lm_head(state), *mtp_logits(state, ids, modules)]
            for k, z in enumerate(logits):
                loss = cross_entropy(z[0, :-1], ids[0, k + 1 :], reduction="sum")
                name = f"mtp.{k}" if k else "main"
                total[name] = total[name] + (0.3 / 2 if k else 1.0) * loss
            for routing in (mains, modules_routing):
                for z in routing.logits.values():
                    total["balance"] = total["balance"] + balance_loss(
                        z, 1, config.top_k, 0.05, "v3"
                    )
        return total

    def accumulated(rule: str, *only: str) -> Run:
        for holder in (model, modules):
            holder.zero_grad()
        chosen, loss = factors(split, config, rule, *only), 0.0
        for p, rows in enumerate(split.rows):
            part = sum(chosen[term][p] * x for term, x in part_terms(rows).items())
            part.backward()
            loss += part.item()
        grads = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in own.items()}
        of_modules = {mtp_name(n, config.layers): g for n, g in grads.items()}
        return loss, gradients(model) | our_names(of_modules, hidden)

    right = accumulated("right")
    output, saved = forward(params, config=config, tokens=TOKENS, key_mask=REAL)
    whole = float(output.loss), backward(saved)
    assert error(whole, right) <= GRADIENT
    parts = run_parts(params, split.parts, config)
    assert error(summed([(float(o.loss), grads) for o, grads in parts]), right) <= GRADIENT
    assert counts["mtp.2"].own == [6, 1 + 4 + 0, 3]
    found = term_gradients(params, split, config)
    for term in ("mtp.1", "mtp.2", "balance"):
        means = accumulated(MEANS, term)
        assert error(weighted(found, factors(split, config, MEANS, term)), means) <= GRADIENT
        assert error(whole, means) > 1e-3


@pytest.mark.parametrize("cuts", [(4,), (3,), (2, 3)])
def test_pieces_by_a_cache(cuts: tuple[int, ...], tmp_path: Path) -> None:
    """A model with parameters of its own per piece, and a cache through which later pieces see the
    keys of earlier ones: each piece's gradient is ours, what comes back from later ones included,
    and their sum is the whole's. The balance loss counts whole sequences.

    The cache holds latents, which a later piece expands with its own `kv_b_proj`: this one alone is
    shared out otherwise, and its sum is the same.
    """
    with float64():
        model = build("v3", SMALL, 3, tmp_path)
    config, params = read_checkpoint(tmp_path)
    config = replace(config, balance_weight=0.05)
    rows, length = TOKENS.shape
    spec = "positions=" + "+".join(str(c) for c in cuts)
    split = split_batch(spec, {"tokens": TOKENS}, config)
    ids, ends = torch.tensor(TOKENS), [0, *cuts, length]

    def pieces(scale: list[float]) -> tuple[list[float], list[dict[str, np.ndarray]]]:
        """The losses and the gradients of each piece's own parameters; ``scale`` multiplies the
        pieces' sums of the main loss."""
        models = [deepcopy(model) for _ in split.parts]
        cache = DynamicCache()
        main, gates = [], []
        for one, (start, stop) in zip(models, pairwise(ends), strict=True):
            one.zero_grad()
            routing = Routing(one)
            with float64():
                z = one(ids[:, start:stop], cache=cache, use_cache=True).logits
            last = min(stop, length - 1)
            targets = ids[:, start + 1 : last + 1]
            main.append(
                cross_entropy(
                    z[:, : last - start].flatten(0, 1), targets.flatten(), reduction="sum"
                )
            )
            gates.append([x.unflatten(0, (rows, -1)) for x in routing.logits.values()])
        total = sum(c * x for c, x in zip(scale, main, strict=True))
        for layers in zip(*gates, strict=True):
            total = total + balance_loss(
                torch.cat(layers, 1).flatten(0, 1), rows, config.top_k, 0.05, "v3"
            )
        total.backward()
        return [x.item() for x in main], [gradients(one) for one in models]

    right = [1 / (rows * (length - 1))] * len(split.parts)
    main, theirs = pieces(right)
    ours = run_parts(params, split.parts, config, pieces=True)
    for x, c, grads, (output, own) in zip(main, right, theirs, ours, strict=True):
        assert error((float(output.main), without(own)), (c * x, without(grads))) <= GRADIENT
    output, saved = forward(params, TOKENS, config)
    total = summed([(c * x, grads) for x, c, grads in zip(main, right, theirs, strict=True)])
    assert error((float(output.main), backward(saved)), total) <= GRADIENT

    counts = term_counts(split, config)
    means = rules("main", counts["main"], split.ranks)[MEANS]
    main, theirs = pieces(means)
    wrong = summed([(c * x, grads) for x, c, grads in zip(main, means, theirs, strict=True)])
    found = term_gradients(params, split, config)
    chosen = factors(split, config, MEANS, "main")
    loss = weighted(found, {"main": chosen["main"]})[0]
    assert error((loss, weighted(found, chosen)[1]), wrong) <= GRADIENT
    off = error((float(output.main), backward(saved)), wrong)
    assert off <= GRADIENT if cuts == (4,) else off > 0.01  # 4 targets and 4: it can't show
