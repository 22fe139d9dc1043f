"""Malformed inputs, drawn: every command with one of its files or options broken in a way that
can't be right. Run as a module, it does cases in processes of their own."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from refimpl.bench.results import file_name
from refimpl.checkpoint import write_random
from refimpl.config import preset

from bench.examples import results
from support import byte_level, refimpl_here

CONFIG = preset("tiny")
TOKENS = np.random.default_rng(3).integers(0, 256, (2, 10))
RIGHT = "from refimpl.ops import linear_backward\n"
RESULTS = f"results/{file_name(results().device, results().date)}"

GRADS = "grads --checkpoint one --out out --tokens tokens.npy"
GENERATE = "generate --checkpoint one --max-tokens 1"
COMMANDS: dict[str, list[tuple[str, list[str]]]] = {
    # command -> (sound arguments, the files among them)
    "verify": [("verify linear --examples 1 --text text.txt", ["text.txt"])],
    "grade": [("grade linear mine.py --examples 1 --text text.txt", ["text.txt", "mine.py"])],
    "grads": [
        (GRADS, ["one/config.json", "one/model.safetensors", "tokens.npy"]),
        (GRADS.replace("npy", "json"), ["tokens.json"]),
        (GRADS.replace("one", "three"), ["three/model.safetensors.index.json", "three/"]),
        (GRADS + " --mask mask.npy --key-mask mask.json", ["mask.npy", "mask.json"]),
        (GRADS + " --targets targets.npy", ["targets.npy"]),
        (GRADS + " --dlogits dlogits.npy", ["dlogits.npy"]),
        (GRADS + " --routes routes.safetensors", ["routes.safetensors"]),
        (GRADS.replace("--tokens tokens.npy", "--text text.txt"), ["one/tokenizer.json"]),
    ],
    "generate": [
        (GENERATE + " --prompt x", ["one/config.json", "one/model.safetensors"]),
        (GENERATE + " --prompt x", ["one/generation_config.json"]),
        (GENERATE + " --prompt x", ["one/tokenizer.json", "one/tokenizer_config.json"]),
        (GENERATE + " --prompts prompts.json", ["prompts.json"]),
        (GENERATE + " --prompts prompts.txt", ["prompts.txt"]),
        (GENERATE + " --tokens tokens.npy", ["tokens.npy"]),
        (GENERATE + " --tokens tokens.json", ["tokens.json"]),
    ],
    "count": [("count one/config.json", ["one/config.json"])],
    "conventions": [("conventions 1", [])],
    "memory": [("memory --grads --model one/config.json --layers 99", ["one/config.json"])],
    "bench": [("bench --table --results results", [RESULTS])],
}
WRONG_OPTIONS: dict[str, list[list[str]]] = {
    "verify": [["--examples", "0"], ["--digits", "7"], ["--dtype", "?"], ["--seed", "-1"]],
    "grade": [["--examples", "0"], ["--digits", "7"], ["--seed", "-1"]],
    "grads": [
        ["--layers", "0"],
        ["--mtp-weight", "1"],
        ["--balance-alpha", "nan"],
        ["--only", "?"],
        ["--activations", "?"],
        ["--convention", "?"],
        ["--dtype", "?"],
        ["--routes", "?"],
        ["--mask", "?.npy"],
    ],
    "generate": [
        ["--temperature", "nan"],
        ["--top-p", "2"],
        ["--stop", "256"],
        ["--seed", "-1"],
        ["--max-tokens", "0"],
        ["--prompt", ""],
        ["--prompts", "?"],
    ],
    "count": [["--length", "0"], ["--length", "?"]],
    "conventions": [["0"], ["99"]],
    "memory": [["--tokens", "1"], ["--model", "?"]],
    "bench": [["--gpu"], ["--runs", "?"]],
}
NAMES = ["x" * 300, "no/such", "a\x1b[31mb", "a\nb", "[/red]", ":smile:", "\udcff", "ünï", "."]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4300\n"
INTEGERS = [
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank",
    "v_head_dim",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "n_routed_experts",
    "num_experts_per_tok",
    "first_k_dense_replace",
]
OPTIONAL = {"one/generation_config.json", "one/tokenizer_config.json"}


def sound_inputs(folder: Path) -> None:
    """Files that every command of `COMMANDS` takes."""
    write_random(CONFIG, folder / "one")
    write_random(CONFIG, folder / "three", shard_bytes=50_000)
    byte_level(folder / "one")
    (folder / "one" / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    (folder / "one" / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    np.save(folder / "tokens.npy", TOKENS)
    np.save(folder / "targets.npy", TOKENS)
    counts = np.arange(TOKENS.shape[1]) < TOKENS.shape[1] - 1  # the last token predicts nothing
    counts = np.broadcast_to(counts, TOKENS.shape)
    np.save(folder / "mask.npy", counts)
    np.save(folder / "dlogits.npy", np.zeros((*TOKENS.shape, CONFIG.vocabulary), np.float32))
    (folder / "mask.json").write_text(json.dumps(np.ones(TOKENS.shape, int).tolist()))
    (folder / "tokens.json").write_text(json.dumps(TOKENS.tolist()))
    routes = np.broadcast_to(np.arange(CONFIG.top_k), (*TOKENS.shape, CONFIG.top_k)).copy()
    save_file({"aux/routes.1": routes, "aux/routes.2": routes}, folder / "routes.safetensors")
    (folder / "prompts.json").write_text('["ab", "cd"]')
    (folder / "prompts.txt").write_text("ab\ncd\n")
    (folder / "text.txt").write_bytes(bytes(range(32, 127)) * 20)
    (folder / "mine.py").write_text(RIGHT)
    (folder / "results").mkdir()
    (folder / RESULTS).write_text(json.dumps(results().to_json()))


class Case(NamedTuple):
    what: str  # what is wrong
    arguments: list[str]


def draw(rng: random.Random, command: str, sound: Path, folder: Path) -> Case:
    """A case, and the files of it in ``folder``: links to the sound ones, and a broken one."""
    shutil.copytree(sound, folder, copy_function=os.link)
    given, files = rng.choice(COMMANDS[command])
    arguments = given.split()
    if not files or rng.random() < 0.25:
        return _wrong_option(rng, command, arguments)
    file = rng.choice(files)
    if file == "three/":
        file += f"model-0000{rng.randint(1, 3)}-of-00003.safetensors"
    path = folder / file
    data = path.read_bytes()
    path.unlink()
    damages = [*_of_any_file(file), *_of_kind(command, file)]
    name, damage = rng.choice(damages)
    damage(path, data, rng)
    return Case(f"{file}: {name}", arguments)


def _wrong_option(rng: random.Random, command: str, arguments: list[str]) -> Case:
    what = rng.choice(["unknown", "value", "json", "missing value"])
    if what == "unknown":
        added = ["--" + rng.choice(["zzz", "x" * 300, "a\x1b[31m", "[/red]"])]
    elif what == "json" and command not in ("grade", "memory"):
        added = ["--json", rng.choice(["x" * 300, "no/such", "\x1b[31m/x", ".", os.devnull])]
    elif what == "missing value":
        added = ["--json"]
    else:
        added = list(rng.choice(WRONG_OPTIONS[command]))
        added[-1] = added[-1].replace("?", rng.choice([x for x in NAMES if x != "."]))
    return Case(f"option {added}", arguments + added)


Damage = Callable[[Path, bytes, random.Random], object]


def _sparse(path: Path, data: bytes, rng: random.Random) -> None:
    path.write_bytes(data[: rng.choice([0, 8, len(data)])])
    os.truncate(path, rng.choice([2**32 + 5, 2**33]))


def _of_any_file(file: str) -> list[tuple[str, Damage]]:
    found: list[tuple[str, Damage]] = [
        ("folder", lambda path, data, rng: path.mkdir()),
        ("pipe", lambda path, data, rng: os.mkfifo(path)),
        ("device", lambda path, data, rng: path.symlink_to("/dev/zero")),
        ("dangling", lambda path, data, rng: path.symlink_to("nothing")),
        ("empty", lambda path, data, rng: path.write_bytes(b"")),
        ("large", _sparse),
        ("noise", lambda path, data, rng: path.write_bytes(b"\xff" + rng.randbytes(50))),
        ("pointer", lambda path, data, rng: path.write_bytes(LFS)),
    ]
    if file not in OPTIONAL:
        found.append(("missing", lambda path, data, rng: None))
    if file.endswith(".txt"):  # a pointer is a text
        found = [entry for entry in found if entry[0] != "pointer"]
    if file.startswith("results"):  # where there is no file, there are no results
        found = [entry for entry in found if entry[0] != "missing"]
    return found


def _of_kind(command: str, file: str) -> list[tuple[str, Damage]]:
    if file.endswith(".json"):
        found = _of_json(file)
        if file.endswith("/config.json"):
            found += [("field", _field), ("field", _field)]
            found += [("bomb", _bomb)] if command in ("grads", "generate") else []
        return found + ([("leaf", _leaf)] * 4 if file == RESULTS else [])
    if file.endswith(".npy"):
        return _of_npy(file)
    if file.endswith(".safetensors"):
        return [
            ("cut", lambda path, data, rng: path.write_bytes(data[: rng.randrange(len(data))])),
            ("longer", lambda path, data, rng: path.write_bytes(data + rng.randbytes(9))),
            ("header", _header),
            ("size", lambda path, data, rng: path.write_bytes(rng.randbytes(8) + data[8:])),
        ]
    if file.endswith(".py"):
        texts = ["x = 1", "raise KeyError('\\x1b\\n')", "def (:", "import sys; sys.exit(0)", "("]
        return [("code", lambda path, data, rng: path.write_text(rng.choice(texts)))]
    return []


def _of_json(file: str) -> list[tuple[str, Damage]]:
    tops = ["7", '"x"', "true", "NaN", "1e999", "[[1], 2]", '[["a"]]', '{"a": 1, "a": 2}', "[{}]"]

    def cut(path: Path, data: bytes, rng: random.Random) -> None:
        path.write_bytes(data.rstrip()[: rng.randrange(len(data.rstrip()))])

    def deep(path: Path, data: bytes, rng: random.Random) -> None:
        depth = rng.choice([100, 10**4, 10**6])
        path.write_bytes(b"[" * depth + b"]" * depth)

    return [
        ("cut", cut),
        ("deep", deep),
        ("top", lambda path, data, rng: path.write_text(rng.choice(tops))),
        ("bytes", lambda path, data, rng: path.write_bytes(data.rstrip() + b"\x00\xff")),
    ]


def _field(path: Path, data: bytes, rng: random.Random) -> None:
    values = [-1, "x\x1b[31m", [], {}, 1.5, True, None, 10**400, 10**10, float("inf"), [[[0]]]]
    changes: list[dict[str, Any]] = [
        {rng.choice(INTEGERS): rng.choice(values)},
        {"model_type": rng.choice(["llama", 7, None, "\x1b[31m", ["deepseek_v3"]])},
        {"rope_scaling": rng.choice(["yarn", [1], {"type": "x" * 999}, {"type": "yarn"}, 5])},
        {"rope_theta": rng.choice([-1, "x", 1e301, [], True])},
        {rng.choice("abc\x1b\n"): float("nan")},
    ]
    path.write_text(json.dumps(json.loads(data) | rng.choice(changes)))


def _bomb(path: Path, data: bytes, rng: random.Random) -> None:
    """What fits into a config.json and into no machine."""
    changes = [
        {"n_routed_experts": 10**6},
        {"n_routed_experts": 10**9, "num_hidden_layers": 10**4},
        {"num_hidden_layers": 10**4},
        {"hidden_size": 10**9},
        {"vocab_size": 10**9},
        {"num_attention_heads": 10**9, "num_key_value_heads": 10**9},
        {"quantization_config": {"weight_block_size": [1, 10**8, 1]}},
    ]
    path.write_text(json.dumps(json.loads(data) | rng.choice(changes)))


def _leaf(path: Path, data: bytes, rng: random.Random) -> None:
    """One value of a result of another type, or one that can't be measured."""
    content = json.loads(data)
    places: list[tuple[Any, Any]] = []

    def walk(x: Any) -> None:
        for key in x.keys() if isinstance(x, dict) else range(len(x)):
            places.append((x, key))
            if isinstance(x[key], dict | list):
                walk(x[key])

    walk(content)
    inside, key = rng.choice(places)
    before = inside[key]
    others = [-1, "x\x1b", [1], {"a": 1}, True, [], 10**400]
    inside[key] = rng.choice([x for x in others if type(x) is not type(before)])
    path.write_text(json.dumps(content))


def _header(path: Path, data: bytes, rng: random.Random) -> None:
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start])
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    change = rng.choice(["dtype", "shape", "offsets", "name", "text"])
    if change == "name":
        header["a\x1b[31m\n" + "x" * 300] = header.pop(name)
    elif change == "dtype":
        entry["dtype"] = rng.choice(["F99", 7, None, "U8"])
    elif change == "shape":
        entry["shape"] = rng.choice([[2**40, 2**40], [-1], "x", [1.5], 7])
    else:
        entry["data_offsets"] = rng.choice([[0, 2**62], [5, 1], [0], "x", [-1, 3]])
    text = "[" * 5000 if change == "text" else json.dumps(header)
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + data[start:])


def _of_npy(file: str) -> list[tuple[str, Damage]]:
    def large(path: Path, data: bytes, rng: random.Random) -> None:
        """All zeros, and all there."""
        shape = rng.choice([(1, 2**30), (2**15, 2**15), (2, 10, 2**26)])
        kind = "<f4" if file.startswith("dlogits") else "|b1" if file[0] == "m" else "<i8"
        header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
        header += b" " * (-(len(header) + 11) % 64) + b"\n"
        path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
        os.truncate(path, 10 + len(header) + int(np.prod(shape)) * int(kind[-1]))

    def other(path: Path, data: bytes, rng: random.Random) -> None:
        arrays: list[np.ndarray] = [
            np.array([{"a": 1}]),
            np.full((2, 10, 4), "x"),
            np.full((2, 10), 1j),
            np.full((2, 10, 256), np.nan),
            np.zeros((0, 3)),
            np.array(1.5),
            np.full((2, 10), -5),
            np.full((2, 10), 2**62),
        ]
        np.save(path, rng.choice(arrays), allow_pickle=True)

    def archive(path: Path, data: bytes, rng: random.Random) -> None:
        with path.open("wb") as opened:
            np.savez(opened, a=TOKENS)

    def cut(path: Path, data: bytes, rng: random.Random) -> None:
        path.write_bytes(data[: rng.randrange(len(data))])

    return [
        ("zeros", large),
        ("zeros", large),
        ("other", other),
        ("archive", archive),
        ("cut", cut),
    ]


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """What stands in the folder, apart from --out."""
    found = {path: path.lstat() for path in folder.rglob("*")}
    return {
        str(path.relative_to(folder)): (x.st_mtime_ns, x.st_size)
        for path, x in found.items()
        if path.relative_to(folder).parts[0] != "out" and not path.is_dir()
    }


def children(folder: Path) -> None:
    """Each case of standard input, a line of JSON, in a process of its own, forked from this one
    that has imported everything: a line with its exit code, errors, seconds and peak bytes."""
    from refimpl.cli import main

    for arguments in (["count", "x"], ["--bogus"]):  # typer imports as it goes
        refimpl_here(*arguments)
    for number, line in enumerate(sys.stdin):
        place, arguments = json.loads(line)
        errors = folder / f"errors-{number}"
        start = time.perf_counter()
        if (child := os.fork()) == 0:
            os.chdir(place)
            for descriptor, file in ((1, folder / "output"), (2, errors)):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
            resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
            sys.argv = ["refimpl", *arguments]
            try:
                main()
            except SystemExit as left:
                sys.stderr.flush()
                os._exit(int(left.code or 0))
        _, status, used = os.wait4(child, 0)
        seconds = time.perf_counter() - start
        code = os.waitstatus_to_exitcode(status)
        told = errors.read_text()
        print(json.dumps([code, told, seconds, used.ru_maxrss * 1024]), flush=True)


if __name__ == "__main__":
    children(Path(sys.argv[1]))
