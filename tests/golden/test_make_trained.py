"""The script that made tests/golden/trained still makes such a checkpoint."""

from __future__ import annotations

from pathlib import Path

from safetensors.numpy import load_file

from golden.make_trained import main
from support import ROOT


def test_the_same_kind(tmp_path: Path) -> None:
    """The same files, config and tensors, after a few steps."""
    committed, made = ROOT / "tests" / "golden" / "trained", tmp_path / "trained"
    (tmp_path / "a.txt").write_text("the cat sat on the mat, the rat on the hat\n" * 60)
    main(made, tokens=3 * 768, implementation="reference", text=str(tmp_path / "a.txt"))
    assert sorted(x.name for x in made.iterdir()) == sorted(x.name for x in committed.iterdir())
    assert (made / "config.json").read_text() == (committed / "config.json").read_text()
    kinds = []
    for folder in (made, committed):
        tensors = load_file(folder / "model.safetensors")
        kinds.append({name: (x.shape, x.dtype) for name, x in tensors.items()})
    assert kinds[0] == kinds[1]
