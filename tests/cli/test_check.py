"""``refimpl check``: its output and exit codes, the files it writes, and malformed inputs."""

from __future__ import annotations

import json
import pickle
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from refimpl.cli.check import _again
from refimpl.port.truth import Truth

from port.conftest import example, no_catalogue
from port.examples import Arrays, Example, edited, save, write_vectors
from support import PACKAGE, refimpl_here

__all__ = ["example", "no_catalogue"]  # the fixtures

pytestmark = pytest.mark.usefixtures("no_catalogue")
O_PROJ = "grad/model.layers.1.self_attn.o_proj.weight"
NORM = "grad/model.norm.weight"


def check(*arguments: object, cwd: Path | None = None) -> tuple[int, str, str]:
    done = refimpl_here("check", *arguments, cwd=cwd)
    return done.returncode, done.stdout, done.stderr


def test_exit_codes(example: Example, tmp_path: Path) -> None:
    path = tmp_path / "port.safetensors"
    x = example.arrays[O_PROJ]
    for arrays, code, word in (
        (example.arrays, 0, "PASS"),
        (example.arrays | {O_PROJ: 2 * x}, 1, "FAIL"),
        (example.arrays | {O_PROJ: x.T.copy()}, 1, "INCONCLUSIVE"),
    ):
        found, out, err = check(save(path, arrays), "--against", example.truth)
        assert (found, err) == (code, "")
        assert out.startswith(f"{word}: ")


def test_files(example: Example, tmp_path: Path) -> None:
    path = save(tmp_path / "port.safetensors", example.arrays | {O_PROJ: -example.arrays[O_PROJ]})
    given = ["--json", tmp_path / "a.json", "--html", tmp_path / "a.html"]
    assert check(path, "--against", example.truth, *given)[0] == 1
    schema = json.loads((PACKAGE / "port" / "schemas" / "check.json").read_text())
    content = json.loads((tmp_path / "a.json").read_text())
    jsonschema.validate(content, schema)
    assert content["first_wrong"]["tensor"] == O_PROJ
    assert content["tensors"][O_PROJ]["cosine"] == pytest.approx(-1)
    assert O_PROJ in (tmp_path / "a.html").read_text()


def test_npz(example: Example, tmp_path: Path) -> None:
    gradients = {name: x for name, x in example.arrays.items() if name.startswith("grad/")}
    np.savez(tmp_path / "port.npz", **gradients)
    assert check(tmp_path / "port.npz", "--against", example.truth)[0] == 0


def test_map_and_only(example: Example, tmp_path: Path) -> None:
    path = save(tmp_path / "port.safetensors", {"out.1": example.arrays[O_PROJ].T.copy()})
    (tmp_path / "map.toml").write_text(
        '"model.layers.{L}.self_attn.o_proj.weight" = { theirs = "out.{L}", transpose = true }'
    )
    given = [path, "--against", example.truth, "--map", tmp_path / "map.toml"]
    code, out, _ = check(*given)
    assert code == 1
    assert out.startswith("INCONCLUSIVE: missing: grad/")
    code, out, _ = check(*given, "--only", "*.1.self_attn.o_proj.*", "--dtype", "float32")
    assert code == 0
    assert out.startswith("PASS: 1 tensor within 4 units of float32")


def test_list(example: Example, tmp_path: Path) -> None:
    code, out, _ = check("--list", "--against", example.truth)
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == "act/model.embed_tokens [2, 9, 20]"
    assert "aux/routes.1…2 (2 tensors) [2, 9, 2] int64" in lines
    assert "grad/model.layers.1…3.mlp.experts.0…3.down_proj.weight (12 tensors) [20, 9]" in lines
    assert lines[-1].startswith("148 tensors; a gradient may also have its parameter's name")
    assert len(lines) < 70
    code, out, _ = check("--list", "--against", example.truth, "--only", "act/*.0")
    assert out.splitlines()[0] == "act/model.layers.0 [2, 9, 20]"
    write_vectors(tmp_path / "truth")
    code, out, _ = check("--list", "--against", tmp_path / "truth")
    assert (code, out.splitlines()[0]) == (0, "linear-1/out/y [2, 3]")


def test_the_command_for_other_routes(example: Example, tmp_path: Path) -> None:
    routes = example.arrays["aux/routes.1"].copy()
    routes[0, 0] = [e for e in range(4) if e // 2 != routes[0, 0, 0] // 2]
    arrays = example.arrays | {"aux/routes.1": routes, O_PROJ: 2 * example.arrays[O_PROJ]}
    truth = edited(example.truth, tmp_path, lambda x: x["metadata"].update(checkpoint=None))
    code, out, _ = check(save(tmp_path / "my port.safetensors", arrays), "--against", truth)
    assert code == 1
    assert out.splitlines()[-1].strip() == (
        "refimpl grads --checkpoint CHECKPOINT --tokens TOKENS --mtp --mtp-weight 0.3 "
        "--balance-alpha 0.02 --activations '*' --convention official --dtype float64 "
        f"--units float64,float32,bfloat16 --routes '{tmp_path}/my port.safetensors' --out NEW"
    )


# Malformed inputs: one line, exit code 2


def write(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def index(change: Callable[[Any], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "truth" / "index.json"
        content = json.loads(path.read_text())
        change(content)
        write(path, json.dumps(content).encode())

    return damage


def port(change: Callable[[Arrays], Arrays]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "port.safetensors"
        arrays = change({NORM: np.ones(20)})
        path.unlink()
        save_file(arrays, path)

    return damage


def text(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: write(folder / file, content)


def absent(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def cut(file: str, size: int) -> Callable[[Path], None]:
    return lambda folder: write(folder / file, (folder / file).read_bytes()[:size])


PORT, INDEX = "port.safetensors", "truth/index.json"
NORM_FILE = "truth/grad-norm.safetensors"
ENTRY: Callable[[Any], Any] = lambda x: x["tensors"][NORM]  # noqa: E731
DAMAGED: dict[str, Callable[[Path], object]] = {
    "port missing": absent(PORT),
    "port empty": text(PORT, b""),
    "port noise": text(PORT, b"\xff" * 60),
    "port cut": cut(PORT, 90),
    "port header cut": cut(PORT, 12),
    "port longer": lambda f: write(f / PORT, (f / PORT).read_bytes() + b"x"),
    "port a pickle": text(PORT, pickle.dumps([1]) + bytes(50)),
    "port a zip": text(PORT, b"PK\x03\x04" + bytes(60)),
    "port a pointer": text(PORT, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "port header no JSON": text(PORT, (8).to_bytes(8, "little") + b"{'a': 1}"),
    "port header a list": text(PORT, (8).to_bytes(8, "little") + b"[1,2,3] "),
    "port header deep": text(PORT, (9000).to_bytes(8, "little") + b"[" * 9000),
    "port without tensors": port(lambda x: {}),
    "port of other names": port(lambda x: {"a\x1b[31m\n" + "x" * 400: np.ones(2)}),
    "port of names alone": port(lambda x: {"": np.ones(2)}),
    "port in float16": port(lambda x: {NORM: x[NORM].astype(np.float16)}),
    "port in float8": port(lambda x: {NORM: x[NORM].astype(ml_dtypes.float8_e4m3fn)}),
    "port in uint8": port(lambda x: {NORM: x[NORM].astype(np.uint8)}),
    "port of other tokens": port(lambda x: x | {"in/tokens": np.zeros((2, 9), np.int64)}),
    "port of more tokens": port(lambda x: x | {"in/tokens": np.zeros((2, 99), np.int64)}),
    "port a folder": lambda f: ((f / PORT).unlink(), (f / PORT).mkdir()),
    "port a folder of pickles": lambda f: (
        (f / PORT).unlink(),
        (f / PORT).mkdir(),
        (f / PORT / "a.pt").write_bytes(b"\x80"),
    ),
    "port a folder with a broken file": lambda f: (
        (f / PORT).unlink(),
        (f / PORT).mkdir(),
        (f / PORT / "a.npz").write_bytes(b"x"),
    ),
    "port a link to itself": lambda f: ((f / PORT).unlink(), (f / PORT).symlink_to(PORT)),
    "truth missing": lambda f: shutil.rmtree(f / "truth"),
    "truth a file": lambda f: (shutil.rmtree(f / "truth"), (f / "truth").write_text("x")),
    "index missing": absent(INDEX),
    "index empty": text(INDEX, b""),
    "index noise": text(INDEX, b"\xff\xfe{}"),
    "index cut": cut(INDEX, 500),
    "index a number": text(INDEX, b"7"),
    "index a list": text(INDEX, b"[1]"),
    "index deep": text(INDEX, b"[" * 10**5 + b"]" * 10**5),
    "index twice": text(INDEX, b'{"metadata": {}, "metadata": {}}'),
    "index without tensors": index(lambda x: x.pop("tensors")),
    "index without metadata": index(lambda x: x.pop("metadata")),
    "index of no tensors": index(lambda x: x["tensors"].clear()),
    "index of another format": index(lambda x: x["metadata"].update(format="1")),
    "index of another kind": index(lambda x: x["metadata"].update(kind=["model"])),
    "index without units": index(lambda x: x["metadata"].update(units=None)),
    "units no object": index(lambda x: x["metadata"].update(units=3)),
    "units of no type": index(lambda x: x["metadata"]["units"].update(types=7)),
    "config no object": index(lambda x: x["metadata"].update(config=[])),
    "config without a field": index(lambda x: x["metadata"]["config"].pop("heads")),
    "config with a wrong field": index(lambda x: x["metadata"]["config"].update(rope=3)),
    "config with a wrong type": index(lambda x: x["metadata"]["config"].update(layers="3")),
    "config with a huge field": index(lambda x: x["metadata"]["config"].update(layers=10**12)),
    "conventions wrong": index(lambda x: x["metadata"]["config"].update(conventions={"a": 1})),
    "yarn wrong": index(lambda x: x["metadata"]["config"].update(yarn=[[1]])),
    "tensor without a file": index(lambda x: ENTRY(x).pop("file")),
    "tensor of a file elsewhere": index(lambda x: ENTRY(x).update(file="/etc/passwd")),
    "tensor of no file": index(lambda x: ENTRY(x).update(file="no.safetensors")),
    "tensor of another shape": index(lambda x: ENTRY(x).update(shape=[4, 5])),
    "tensor of no shape": index(lambda x: ENTRY(x).update(shape=20)),
    "tensor of a broken shape": index(lambda x: ENTRY(x).update(shape=[True, "20"])),
    "tensor of another type": index(lambda x: ENTRY(x).update(dtype="int8")),
    "tensor's units no numbers": index(lambda x: ENTRY(x).update(units={"float64": [1]})),
    "tensor's units no object": index(lambda x: ENTRY(x).update(units=3)),
    "tensor's scale no number": index(lambda x: ENTRY(x).update(scale="x")),
    "tensor the same as none": index(lambda x: x["tensors"].update({NORM: {"same_as": "no"}})),
    "tensor the same as itself": index(lambda x: x["tensors"].update({NORM: {"same_as": NORM}})),
    "tensor no object": index(lambda x: x["tensors"].update({NORM: 3})),
    "file of the truth missing": absent(NORM_FILE),
    "file of the truth cut": cut(NORM_FILE, 100),
    "file of the truth noise": text(NORM_FILE, b"x" * 99),
    "map missing": absent("map.toml"),
    "map empty": text("map.toml", b""),
    "map noise": text("map.toml", b"\xff\xfe"),
    "map no TOML": text("map.toml", b"a = = b"),
    "map deep": text("map.toml", b"a = " + b"[" * 10**5),
    "map of a number": text("map.toml", b"a = 1.5"),
    "map of lists": text("map.toml", b'a = [["b"]]'),
    "map with a key that is none": text("map.toml", b'a = { theirs = "b", "\\u001b" = 1 }'),
    "map a folder": lambda f: ((f / "map.toml").unlink(), (f / "map.toml").mkdir()),
}
OPTIONS = [
    ["--only", "no*such"],
    ["--only", "\x1b[31m"],
    ["--only", ""],
    ["--dtype", "float16"],
    ["--dtype", "\x1b"],
    ["--against", "no/such"],
    ["--against", "x" * 300],
    ["--map", "x" * 300],
    ["--json", "no/such.json"],
    ["--html", "no/such.html"],
    ["--html", "."],
    ["--list", "--only", "no*such"],
    ["--bogus"],
]


@pytest.fixture(scope="module")
def sound(example: Example, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    shutil.copytree(example.truth, folder / "truth")
    save_file({NORM: example.arrays[NORM]}, folder / PORT)
    (folder / "map.toml").write_text('"model.norm.weight" = "norm"')
    return folder


GIVEN = [PORT, "--against", "truth", "--map", "map.toml", "--only", "*norm.weight"]


def expect_refused(what: str, done: tuple[int, str, str]) -> None:
    code, out, err = done
    assert (code, out, err.count("\n")) == (2, "", 1), (what, done)
    assert err.startswith("refimpl: "), what
    assert err[:-1].isprintable(), what
    assert len(err) < 1500, what


def test_the_inputs_are_sound(sound: Path) -> None:
    assert check(*GIVEN[:-2], "--only", NORM, cwd=sound)[0] == 0
    assert len(DAMAGED) + len(OPTIONS) >= 60


@pytest.mark.parametrize("what", DAMAGED)
def test_malformed(what: str, sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path / "case", copy_function=lambda a, b: Path(b).hardlink_to(a))
    DAMAGED[what](tmp_path / "case")
    expect_refused(what, check(*GIVEN[:-2], "--only", NORM, cwd=tmp_path / "case"))


@pytest.mark.parametrize(
    "given", OPTIONS, ids=lambda x: " ".join(x).encode("unicode_escape").decode()
)
def test_options_that_are_wrong(given: list[str], sound: Path) -> None:
    expect_refused(str(given), check(*GIVEN, *given, cwd=sound))


def test_what_is_not_given(sound: Path) -> None:
    expect_refused("no truth", check(PORT, cwd=sound))
    expect_refused("nothing", check(cwd=sound))
    code, _, err = check("--against", "truth", cwd=sound)
    assert (code, err) == (2, "refimpl: give the file or folder with your tensors, or --list\n")
    code, _, err = check(PORT, "--against", "truth", "--only", "no", cwd=sound)
    assert err == (
        "refimpl: --only must match a name of the truth, such as act/model.embed_tokens, got no\n"
    )


def test_the_command_names_what_else_the_truth_was_run_with(
    example: Example, tmp_path: Path
) -> None:
    """A truth of GRPO, of padded sequences and in parts must not be run again without them."""

    def change(index: Any) -> None:
        index["metadata"]["request"]["loss"] = "grpo"
        index["metadata"]["split"] = {
            "spec": "rows=1+1",
            "shapes": [[1, 9]] * 2,
            "rules": {"grpo": {"right": [1, 1]}},
        }
        index["tensors"]["in/key_mask"] = index["tensors"]["in/mask"]

    truth = Truth.open(edited(example.truth, tmp_path, change))
    command = _again(truth, types.SimpleNamespace(routes=Path("p.safetensors")))  # type: ignore[arg-type]
    assert " --grpo GRPO --key-mask KEY-MASK --split rows=1+1 " in command
