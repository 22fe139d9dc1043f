"""A verdict with all that belongs to it: the catalogue of planted bugs is computed again."""

from __future__ import annotations

from pathlib import Path

from safetensors.numpy import load_file, save_file

from refimpl.checkpoint import Checkpoint
from refimpl.config import CONVENTIONS
from refimpl.grads import Request, write_gradients
from refimpl.port.verdict import compare_folders

from golden.checkpoint_values import GOLDEN
from port.examples import TINY, Example, edited, parameters, planted, routes_of, run, save


def test_a_mistake_is_named(example: Example, tmp_path: Path) -> None:
    """In a port in float32: the part, the rows, the bug, its line."""
    ops = planted("mla", "gradient of k_pe from one head")
    wrong = run(tmp_path / "run", parameters(), TINY, ops=ops, routes=routes_of(example.arrays))
    narrow = {n: x.astype("float32") if x.dtype.kind == "f" else x for n, x in wrong.items()}
    text = str(compare_folders(save(tmp_path / "port.safetensors", narrow), example.truth))
    assert text.startswith("FAIL: ")
    for line in (
        "first wrong part: layer 3, attention, backward: grad/model.layers.3.self_attn.kv_a_proj",
        "latent rows: ok, rotated key rows: wrong",
        "these are the numbers of the planted bug mla: gradient of k_pe from one head",
        "(mla.11) has sum_along(dk[..., n:], axis=2); the bug has dk[:, :, 0, n:]",
    ):
        assert line in text


def test_without_the_checkpoint_the_verdict_stands(example: Example, tmp_path: Path) -> None:
    """It says that no bug was tried, and of a port that is right, what is not known."""
    truth = edited(example.truth, tmp_path, lambda x: x["metadata"].update(checkpoint=None))
    name = "grad/model.layers.1.self_attn.o_proj.weight"
    wrong = example.arrays | {name: -example.arrays[name]}
    verdict = compare_folders(save(tmp_path / "port.safetensors", wrong), truth)
    assert verdict.verdict == "FAIL"
    assert verdict.diagnosis is not None
    assert "no planted bug was tried: " in verdict.diagnosis.note
    assert verdict.diagnosis.named == []
    verdict = compare_folders(save(tmp_path / "port.safetensors", example.arrays), truth)
    assert verdict.verdict == "PASS"
    assert "it is not known which mistakes would not show here: " in verdict.notes[-1]


def test_code_that_is_not_ours_passes(tmp_path: Path) -> None:
    """Transformers' model in float64, on the golden checkpoint; and, one gradient turned round, it
    does not."""
    golden = load_file(GOLDEN / "v3" / "outputs.safetensors")
    source = Checkpoint.open(
        GOLDEN / "v3", dtype="float64", conventions=CONVENTIONS["hf"], mtp=False
    )
    tokens, padding = golden.pop("aux/tokens"), golden.pop("aux/key_mask")
    request = Request(tokens, key_mask=padding, units=("float64",))
    write_gradients(source, request, tmp_path / "truth", origin=GOLDEN / "v3")
    save_file(golden, tmp_path / "theirs.safetensors")
    verdict = compare_folders(tmp_path / "theirs.safetensors", tmp_path / "truth")
    assert (verdict.verdict, verdict.extra) == ("PASS", []), str(verdict)
    assert len(verdict.those("ok")) == 91
    name = "grad/model.layers.1.self_attn.q_b_proj.weight"
    save_file(golden | {name: golden[name][::-1].copy()}, tmp_path / "theirs.safetensors")
    verdict = compare_folders(tmp_path / "theirs.safetensors", tmp_path / "truth")
    assert [x.name for x in verdict.those("wrong")] == [name]
