"""Malformed checkpoints: one line that names the file or the field, and never another exception."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from refimpl.checkpoint import Checkpoint, load_config, write_random
from refimpl.config import preset
from refimpl.errors import CouldNotRun

from support import FULL

TINY = preset("tiny")
ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
GATE_BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"
MATRIX = "model.layers.0.self_attn.o_proj.weight"

Header = dict[str, Any]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sound checkpoints: one file, three files, one file in FP8."""
    folder = tmp_path_factory.mktemp("sound")
    write_random(TINY, folder / "one")
    write_random(TINY, folder / "three", shard_bytes=50_000)
    write_random(TINY, folder / "fp8", dtype="fp8")
    assert len(list((folder / "three").glob("*.safetensors"))) == 3
    for name in ("one", "three", "fp8"):
        Checkpoint.open(folder / name).load()
    return folder


def config(**changes: Any) -> Callable[[Path], None]:
    """Change fields of config.json; a value of ... removes the field."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text()) | changes
        content = {key: value for key, value in content.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(content))

    return apply


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return apply


def removed(*names: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return apply


def tensors(
    change: Callable[[dict[str, np.ndarray]], Any], file: str = ONE
) -> Callable[[Path], None]:
    """Change the tensors of a file, which stays a sound safetensors file."""

    def apply(folder: Path) -> None:
        raw = (folder / file).read_bytes()
        start = 8 + struct.unpack("<Q", raw[:8])[0]
        types = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn}
        found = {}
        for name, entry in json.loads(raw[8:start]).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                data = np.frombuffer(raw[start + first : start + last], types[entry["dtype"]])
                found[name] = data.reshape(entry["shape"]).copy()
        change(found)
        save_file(found, folder / file)

    return apply


def header(change: Callable[[Header], Any], file: str = ONE) -> Callable[[Path], None]:
    """Change the header of a file, and nothing behind it."""

    def apply(folder: Path) -> None:
        raw = (folder / file).read_bytes()
        start = 8 + struct.unpack("<Q", raw[:8])[0]
        content = json.loads(raw[8:start])
        text = change(content)
        text = (text if isinstance(text, str) else json.dumps(content)).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + raw[start:])

    return apply


def nested(folder: Path) -> None:
    """As Kimi-K2.5: a model that also sees, its language model's weights in int4."""
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "compressed-tensors"}
    whole = {"model_type": "kimi_k25", "text_config": content}
    (folder / "config.json").write_text(json.dumps(whole))


def index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        change(content)
        (folder / INDEX).write_text(json.dumps(content))

    return apply


def cut(file: str, size: int) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        raw = (folder / file).read_bytes()
        (folder / file).write_bytes(raw[:size])

    return apply


def put(name: str, value: Any) -> Callable[[Path], None]:
    return tensors(
        lambda found: found.update({name: value(found.get(name)) if callable(value) else value})
    )


def longer(folder: Path) -> None:
    (folder / ONE).write_bytes((folder / ONE).read_bytes() + b"more")


def to_zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / ONE, "w") as archive:
        archive.writestr("archive/data.pkl", b"x")


def pickles_alone(folder: Path) -> None:
    (folder / ONE).rename(folder / "pytorch_model.bin")


def copied(source: str, target: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        shutil.copy(folder / source, folder / target)

    return apply


def twice_in_header(content: Header) -> str:
    text = json.dumps(content)
    return text[:-1] + f", {json.dumps(EXPERT)}: {json.dumps(content[EXPERT])}}}"


def entry(name: str, **changes: Any) -> Callable[[Path], None]:
    return header(lambda content: content[name].update(changes))


def shifted(content: Header) -> None:
    content[EXPERT]["data_offsets"][0] -= 2
    content[EXPERT]["data_offsets"][1] -= 2


def hundreds_missing(found: dict[str, np.ndarray]) -> None:
    for name in list(found):
        if ".experts." in name or name.endswith("layernorm.weight"):
            del found[name]


def without_mtp(found: dict[str, np.ndarray]) -> None:
    for name in list(found):
        if name.startswith(("model.layers.3.", "model.layers.4.")):
            del found[name]


def several(found: dict[str, np.ndarray]) -> None:
    del found["model.norm.weight"]
    found["strange"] = np.zeros(3, np.float32)
    found[MATRIX] = found[MATRIX].T.copy()
    found["lm_head.weight"] = found["lm_head.weight"].view(np.int16)


def another_row(x: np.ndarray) -> np.ndarray:
    x[77, 3] += 1
    return x


def not_finite(x: np.ndarray) -> np.ndarray:
    x[1] = np.nan
    return x


SCALE = MATRIX + "_scale_inv"
TENSOR_SCALE = MATRIX + "_scale"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4300\n"

# (which sound checkpoint, what is done to it, what the message must hold)
BAD: list[tuple[str, Callable[[Path], None], str]] = [
    # config.json
    ("one", removed("config.json"), "config.json can't be read: No such file"),
    ("one", written("config.json", "{"), "config.json is not JSON"),
    ("one", written("config.json", b"\xff\xfe"), "config.json is not JSON"),
    ("one", written("config.json", "[1]"), "config.json: the file must be a JSON object, got [1]"),
    ("one", written("config.json", '{"a": 1, "a": 2}'), 'config.json: "a" is given twice'),
    ("one", written("config.json", LFS), "config.json is not JSON"),
    ("one", config(model_type="llama"), "model_type must be one of deepseek_v2, "),
    (
        "one",
        config(model_type="deepseek_v32", architectures=["DeepseekV32ForCausalLM"]),
        "index_topk must be an integer in 1…1,000,000,000, got nothing",
    ),
    (
        "one",
        config(architectures=["LlamaForCausalLM"]),
        'architectures must be ["DeepseekV3ForCausalLM"]',
    ),
    (
        "one",
        config(architectures=["DeepseekV2ForCausalLM"]),
        'architectures must be ["DeepseekV3ForCausalLM"]',
    ),
    ("one", config(rms_norm_eps=float("nan")), "rms_norm_eps must be a finite number, got NaN"),
    (
        "one",
        config(initializer_range=float("inf")),
        "initializer_range must be a finite number, got Infinity",
    ),
    (
        "one",
        config(rope_scaling={"type": "yarn", "factor": [float("-inf")]}),
        "rope_scaling.factor[0] must be",
    ),
    (
        "one",
        config(rope_scaling={"rope_type": "linear", "factor": 2}),
        "rope_scaling's type must be yarn, got",
    ),
    (
        "one",
        config(rope_scaling={"type": "dynamic"}),
        'rope_scaling\'s type must be yarn, got "dynamic"',
    ),
    (
        "one",
        config(rope_scaling=None, rope_parameters={"rope_type": "llama3"}),
        'yarn, got "llama3"',
    ),
    (
        "one",
        config(rope_scaling={"type": "yarn", "rope_type": "default"}),
        "type must be its rope_type, default",
    ),
    (
        "one",
        config(rope_scaling={"type": "yarn"}),
        "factor must be a number of at least 0, got nothing",
    ),
    (
        "one",
        config(rope_scaling={"type": "yarn", "factor": 4, "truncate": False}),
        "truncate must be true, got false",
    ),
    (
        "one",
        config(rope_scaling={"type": "yarn", "factor": 4, "attention_factor": 2.0}),
        "attention_factor must be",
    ),
    (
        "one",
        config(rope_scaling={"type": "yarn", "factor": 4, "original_max_position_embeddings": 0}),
        "original_max_position_embeddings must be a number of at least 1",
    ),
    (
        "one",
        config(rope_theta=1e4, rope_parameters={"rope_theta": 5e4}, rope_scaling=None),
        "rope_theta must be that",
    ),
    ("one", config(rope_interleave="yes"), 'rope_interleave must be true or false, got "yes"'),
    ("one", config(hidden_size=...), "hidden_size must be an integer"),
    ("one", config(hidden_size=10**400), "hidden_size must be an integer"),
    ("one", config(rope_theta=10**400), "rope_theta must be a number of at least 0"),
    ("one", config(num_key_value_heads=1), "num_key_value_heads must be 3, got 1"),
    ("one", config(mlp_bias=True), "mlp_bias must be false, got true"),
    ("one", config(quantization_config="fp8"), "quantization_config must be an object or null"),
    (
        "one",
        config(quantization_config={"quant_method": "awq"}),
        'quant_method must be fp8, got "awq"',
    ),
    (
        "one",
        config(quantization_config={"quant_method": "fp8", "fmt": "e5m2"}),
        'fmt must be e4m3, got "e5m2"',
    ),
    (
        "one",
        config(quantization_config={"weight_block_size": None}),
        "weight_block_size is null, which stands for one scale per tensor (weight_scale): only "
        "one per block (weight_scale_inv) can be read",
    ),
    (
        "one",
        config(quantization_config={"weight_block_size": [0, 128]}),
        "weight_block_size must be two integers",
    ),
    # the config and the tensors
    (
        "one",
        config(hidden_size=21),
        "model.embed_tokens.weight must have shape (256, 21), got (256, 20); ",
    ),
    ("one", config(num_hidden_layers=4), "model.layers.5.enorm.weight is missing; "),
    (
        "one",
        config(num_nextn_predict_layers=0),
        "model.layers.3…4.eh_proj.weight (2 tensors) is not a tensor",
    ),
    (
        "one",
        config(n_routed_experts=12),
        "model.layers.1…4.mlp.experts.8…11.gate_proj.weight (16 tensors) is missing",
    ),
    (
        "one",
        config(q_lora_rank=None),
        "model.layers.0…4.self_attn.q_proj.weight (5 tensors) is missing",
    ),
    ("one", config(tie_word_embeddings=True), "lm_head.weight ("),
    (
        "one",
        tensors(hundreds_missing),
        "model.layers.1…4.mlp.experts.0…7.up_proj.weight (32 tensors) is missing",
    ),
    ("one", tensors(lambda found: found.pop(EXPERT)), f"{EXPERT} is missing"),
    ("one", tensors(several), "model.norm.weight is missing; "),
    ("one", tensors(several), f"{MATRIX} must have shape (20, 18), got (18, 20)"),
    (
        "one",
        tensors(several),
        "lm_head.weight must be F32, BF16, F16, F64 or (a matrix) F8_E4M3, got I16",
    ),
    ("one", tensors(several), "strange is not a tensor of this config"),
    ("one", put("a\nb\x1b[31m", np.zeros(3)), "a?b?[31m is not a tensor of this config"),
    ("one", put(GATE_BIAS, not_finite), f"{GATE_BIAS} must be finite"),
    (
        "one",
        put("model.norm.weight", np.ones((20, 1))),
        "model.norm.weight must have shape (20,), got (20, 1)",
    ),
    (
        "one",
        put("model.norm.weight", np.ones(20).astype(ml_dtypes.float8_e4m3fn)),
        "(a matrix) F8_E4M3, got F8_E4M3",
    ),
    (
        "one",
        put("model.norm.weight", np.full(20, 1e300)),
        "model.norm.weight has numbers that float32 can't hold",
    ),
    (
        "one",
        put("model.layers.3.embed_tokens.weight", another_row),
        "model.layers.3.embed_tokens.weight (",
    ),
    (
        "one",
        put("model.layers.3.embed_tokens.weight", another_row),
        "must equal model.embed_tokens.weight (",
    ),
    (
        "one",
        put("model.layers.4.shared_head.head.weight", another_row),
        "since MTP shares it: row 77 differs",
    ),
    (
        "one",
        tensors(without_mtp),
        "names 2 MTP layer(s) (num_nextn_predict_layers), but no file holds",
    ),
    ("fp8", tensors(lambda found: found.pop(SCALE)), f"{SCALE} is missing"),
    ("fp8", tensors(lambda found: found.pop(MATRIX)), f"{MATRIX} is missing"),
    (
        "fp8",
        tensors(lambda found: found.update({TENSOR_SCALE: found.pop(SCALE)[:1, 0]})),
        f"{MATRIX} is FP8 with one scale per tensor (weight_scale): only one per block "
        "(weight_scale_inv) can be read",
    ),
    (
        "one",
        nested,
        'nests the model in text_config (model_type "kimi_k25"): its parameters can be counted, '
        'but weights of such a file (quant_method "compressed-tensors") can\'t be read',
    ),
    (
        "fp8",
        put(SCALE, np.ones((2, 1), np.float32)),
        f"{SCALE} must have shape (1, 1) (blocks of 128×128), got (2, 1)",
    ),
    ("fp8", put(SCALE, np.ones((1, 1), np.int32)), f"{SCALE} must be F32 or F8_E8M0, got I32"),
    ("fp8", put(SCALE, np.full((1, 1), np.inf, np.float32)), f"{SCALE} must be finite"),
    (
        "fp8",
        put(SCALE, np.full((1, 1), 255, np.uint8).view(ml_dtypes.float8_e8m0fnu)),
        f"{SCALE} must be finite",
    ),
    (
        "fp8",
        put(MATRIX, np.ones((20, 18), np.float32)),
        f"{SCALE} is a scale, but the weight is F32",
    ),
    (
        "fp8",
        config(quantization_config={"weight_block_size": [8, 8]}),
        "(blocks of 8×8), got (1, 1)",
    ),
    # the file
    ("one", removed(ONE), f"holds neither {ONE} nor {INDEX}"),
    ("one", pickles_alone, "holds only pickles (pytorch_model.bin)"),
    ("one", written(ONE, pickle.dumps({"a": 1})), f"{ONE} is a pickle"),
    ("one", to_zip, f"{ONE} is a zip archive"),
    ("one", written(ONE, LFS), f"{ONE} is a git-LFS pointer"),
    ("one", written(ONE, b""), f"{ONE} is not a safetensors file: it has 0 bytes"),
    ("one", written(ONE, b"1234567"), f"{ONE} is not a safetensors file: it has 7 bytes"),
    ("one", written(ONE, bytes(64)), f"{ONE} is cut off or not a safetensors file"),
    ("one", written(ONE, b"GGUF" + bytes(100)), f"{ONE} is cut off or not a safetensors file"),
    ("one", cut(ONE, 500), f"{ONE} is cut off or not a safetensors file"),
    ("one", cut(ONE, -1), f"{ONE} is cut off or not a safetensors file"),
    ("one", cut(ONE, 8), f"{ONE} is cut off or not a safetensors file"),
    ("one", longer, f"{ONE} is cut off or not a safetensors file"),
    ("one", header(lambda content: "{"), f"{ONE} is cut off or not a safetensors file"),
    ("one", header(lambda content: "[1, 2]"), f"{ONE} is cut off or not a safetensors file"),
    ("one", header(lambda content: "[" * 5000), f"{ONE} is cut off or not a safetensors file"),
    ("one", header(shifted), f"{ONE} is cut off or not a safetensors file"),
    ("one", header(twice_in_header), f"{ONE}'s header: {json.dumps(EXPERT)} is given twice"),
    ("one", entry(EXPERT, dtype="BF17"), f"{ONE} is cut off or not a safetensors file"),
    ("one", entry(EXPERT, dtype="F32"), f"{ONE} is cut off or not a safetensors file"),
    ("one", entry(EXPERT, shape=[-9, 20]), f"{ONE} is cut off or not a safetensors file"),
    ("one", entry(EXPERT, shape=[2**40, 2**40]), f"{ONE} is cut off or not a safetensors file"),
    ("one", entry(EXPERT, data_offsets=[0, 2**63]), f"{ONE} is cut off or not a safetensors file"),
    ("one", entry(EXPERT, data_offsets=[4, 0]), f"{ONE} is cut off or not a safetensors file"),
    (
        "one",
        header(lambda content: content[EXPERT].pop("shape")),
        f"{ONE} is cut off or not a safetensors file",
    ),
    # the index and its files
    ("three", removed(SHARD), f"{INDEX} names files that are missing: {SHARD}"),
    (
        "three",
        removed(INDEX),
        f"holds neither {ONE} nor {INDEX} (it has model-00001-of-00003.safetensors, …)",
    ),
    ("three", written(INDEX, "{"), f"{INDEX} is not JSON"),
    ("three", written(INDEX, "{}"), f"{INDEX}: weight_map must be an object"),
    ("three", written(INDEX, '{"weight_map": ["a"]}'), f"{INDEX}: weight_map must be an object"),
    ("three", written(INDEX, '{"weight_map": {"a": 1}}'), f"{INDEX}: weight_map must be an object"),
    (
        "three",
        written(INDEX, '{"weight_map": {"a": "b", "a": "b"}}'),
        f'{INDEX}: "a" is given twice',
    ),
    ("three", written(INDEX, '{"weight_map": {}}'), "is missing"),
    ("three", copied(SHARD, ONE), f"holds both {ONE} and {INDEX}"),
    ("three", copied("model-00001-of-00003.safetensors", SHARD), " is both in "),
    (
        "three",
        index(lambda i: i["weight_map"].pop(EXPERT)),
        f"holds {EXPERT}, which {INDEX} names not at all",
    ),
    (
        "three",
        index(lambda i: i["weight_map"].update({EXPERT: SHARD.replace("2", "3", 1)})),
        f"holds {EXPERT}, which",
    ),
    (
        "three",
        index(lambda i: i["weight_map"].update(extra=SHARD)),
        f"{INDEX} names extra in {SHARD}, which does not",
    ),
    ("three", cut(SHARD, -7), f"{SHARD} is cut off"),
    ("three", written(SHARD, LFS), f"{SHARD} is a git-LFS pointer"),
    *(
        (
            "three",
            index(lambda i, file=file: i["weight_map"].update({EXPERT: file})),
            f"same folder, got {shown}",
        )
        for file, shown in [
            ("../x.safetensors", '"../x.safetensors"'),
            ("/etc/passwd", '"/etc/passwd"'),
            ("", '""'),
            ("/x.safetensors", '"/x.safetensors"'),
            ("a/b.safetensors", '"a/b.safetensors"'),
            ("..", '".."'),
            ("pytorch_model.bin", '"pytorch_model.bin"'),
            ("a\\b.safetensors", '"a\\\\b.safetensors"'),
            ("x.safetensors\n", '"x.safetensors\\n"'),
            ("a\0.safetensors", '"a\\u0000.safetensors"'),
        ]
    ),
]


@pytest.mark.parametrize(
    ("base", "damage", "message"), BAD, ids=[f"{n}: {m}" for n, (_, _, m) in enumerate(BAD)]
)
def test_malformed(
    base: str, damage: Callable[[Path], None], message: str, sound: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(sound / base, folder)
    damage(folder)
    with pytest.raises(CouldNotRun) as raised:
        Checkpoint.open(folder).load()
    told = str(raised.value)
    assert message in told
    assert told.isprintable()
    assert "checkpoint" in told or EXPERT in told
    assert len(told) < 2500


MANY = {"num_hidden_layers": 10**4, "num_nextn_predict_layers": 0}
BOMBS = [
    ({"n_routed_experts": 10**6}, "asks for 12,000,079 tensors"),  # 4 layers, 79 besides
    (MANY | {"n_routed_experts": 10**9}, "asks for 29,"),
    (MANY, "asks for "),
    ({"hidden_size": 10**9}, "must have shape (256, 1000000000)"),
]


@pytest.mark.parametrize(("changes", "message"), BOMBS, ids=range(len(BOMBS)))
def test_a_config_that_no_machine_holds(
    changes: dict[str, int], message: str, sound: Path, tmp_path: Path
) -> None:
    """A kilobyte of config.json asks for millions of tensors: the files' headers say first that
    they are not there."""
    shutil.copytree(sound / "one", tmp_path / "checkpoint")
    config(**changes)(tmp_path / "checkpoint")
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(CouldNotRun) as raised:
        Checkpoint.open(tmp_path / "checkpoint")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message in str(raised.value)
    assert peak < 3e8
    assert time.process_time() - start < 20


def test_names_that_no_file_can_have(sound: Path, tmp_path: Path) -> None:
    name = "n" * 300
    with pytest.raises(CouldNotRun, match=f"{name} does not exist"):
        Checkpoint.open(tmp_path / name)
    with pytest.raises(CouldNotRun, match=f"{name} is neither a preset"):
        load_config(str(tmp_path / name))
    shutil.copytree(sound / "three", tmp_path / "checkpoint")
    index(lambda i: i["weight_map"].update({EXPERT: f"{name}.safetensors"}))(
        tmp_path / "checkpoint"
    )
    with pytest.raises(CouldNotRun, match=r"names files that are missing: n{77}\.\.\.$"):
        Checkpoint.open(tmp_path / "checkpoint")


@pytest.mark.parametrize("file", ["config.json", ONE])
def test_pipes_and_devices(file: str, sound: Path, tmp_path: Path) -> None:
    """They are refused, not waited for."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(sound / "one", folder)
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (folder / file).unlink()
        make(folder / file)
        with pytest.raises(CouldNotRun, match=f"{file} can't be read: not a regular file"):
            Checkpoint.open(folder)


def test_there_are_enough() -> None:
    assert len(BAD) >= 40


@pytest.mark.parametrize(
    ("place", "message"),
    [("missing", "missing does not exist"), ("one/config.json", "config.json is not a folder")],
)
def test_no_folder(place: str, message: str, sound: Path) -> None:
    with pytest.raises(CouldNotRun, match=message):
        Checkpoint.open(sound / place)


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CouldNotRun, match=r"config.json can't be read"):
        Checkpoint.open(tmp_path)


def test_type_in_memory(sound: Path) -> None:
    with pytest.raises(CouldNotRun, match="dtype must be float32 or float64, got bfloat16"):
        Checkpoint.open(sound / "one", dtype="bfloat16")


def test_what_is_allowed(sound: Path, tmp_path: Path) -> None:
    """A bias in another type, buffers of old files, copies left out, links to files elsewhere,
    other types mixed."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(sound / "one", folder)
    wanted = Checkpoint.open(folder).load()

    def change(found: dict[str, np.ndarray]) -> None:
        found["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
        del found["model.layers.3.embed_tokens.weight"]
        found[GATE_BIAS] = found[GATE_BIAS].astype(np.float64)
        found["model.layers.4.shared_head.head.weight"] = found["lm_head.weight"].astype(np.float32)
        found[MATRIX] = found[MATRIX].astype(np.float64)

    tensors(change)(folder)
    (folder / ONE).rename(tmp_path / "elsewhere")
    (folder / ONE).symlink_to(tmp_path / "elsewhere")
    read = Checkpoint.open(folder).load()
    assert all(
        np.array_equal(read[name], wanted[name]) and read[name].dtype == np.float32
        for name in wanted
    )


def test_a_row_that_is_not_there(sound: Path) -> None:
    checkpoint = Checkpoint.open(sound / "one")
    with pytest.raises(IndexError):
        checkpoint.piece("model.embed_tokens.weight", 256)
    with pytest.raises(KeyError):
        checkpoint.tensor("model.layers.9.mlp.gate.weight")


@pytest.fixture(scope="module")
def scratch(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("one", "three", "fp8"):
        shutil.copytree(sound / name, folder / name)
    return folder


@settings(max_examples=3000 if FULL else 200)
@given(data=st.data())
def test_fuzz(data: st.DataObject, scratch: Path) -> None:
    """Bytes of any file flipped, cut off, put in twice: it is read, or CouldNotRun says in one line
    why not."""
    folder = scratch / data.draw(st.sampled_from(["one", "three", "fp8"]))
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    before = path.read_bytes()
    raw = bytearray(before)
    start = 8 + struct.unpack("<Q", before[:8])[0] if path.suffix == ".safetensors" else len(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(
            st.integers(0, data.draw(st.sampled_from([8, start, len(before)])) - 1)
        ) % max(1, len(raw))
        what = data.draw(st.sampled_from(["flip", "digit", "cut", "drop", "repeat"]))
        if what == "flip" and raw:
            raw[where] ^= data.draw(st.integers(1, 255))
        elif what == "digit" and raw:
            raw[where] = ord(data.draw(st.sampled_from('0123456789-"[]{},:.eNaI')))
        elif what == "cut":
            del raw[where:]
        elif what == "drop":
            del raw[where : where + data.draw(st.integers(1, 40))]
        else:
            raw[where:where] = raw[where : where + data.draw(st.integers(1, 40))]
    try:
        path.write_bytes(raw)
        params = Checkpoint.open(folder).load()
        assert all(p.dtype == np.float32 for p in params.values())
    except CouldNotRun as error:
        told = str(error)
    else:
        told = ""
    finally:
        path.write_bytes(before)
    assert told == "" or told.isprintable()


def test_the_command_line_says_it_in_one_line(sound: Path, tmp_path: Path) -> None:
    """Exit code 2 and one line, through `refimpl count`, which reads a config.json."""
    shutil.copytree(sound / "one", tmp_path / "a")
    config(rope_scaling={"type": "linear"})(tmp_path / "a")
    command = [sys.executable, "-m", "refimpl", "count", "a/config.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert (
        done.stderr == 'refimpl: a/config.json: rope_scaling\'s type must be yarn, got "linear"\n'
    )
