"""`refimpl.kernels.compile`: every kernel for every target and type within its budget, its PTX and
machine code; the cache, and what is said where it cannot compile."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from refimpl.errors import CouldNotRun
from refimpl.kernels import SOURCE, compile, router
from refimpl.kernels.columns import variants
from refimpl.kernels.compile import STEMS, STORAGE, TARGETS, BuildError, build, compile_kernel
from refimpl.kernels.flash_attention import COMPILED_AHEAD, tiles
from refimpl.kernels.grouped_linear import TILINGS
from refimpl.kernels.mla_decode import tiles_ahead

from kernel_support import EXECUTED, without_a_device
from kernel_support.planted import PLANTED, sources
from kernel_support.sass import loads_in_flight, machine_code
from support import FULL

# Most registers of a thread (in any type, for any target) and static shared memory of a block in
# bytes.
BUDGET = {
    "adamw_update": (48, 0),
    "cross_entropy_backward": (40, 0),
    "cross_entropy_forward": (96, 256),
    "cross_entropy_in_place": (96, 256),
    "cross_entropy_loss": (32, 256),
    "embedding_backward": (64, 4096),
    "embedding_gather": (32, 0),
    "embedding_runs": (56, 4096),
    "grpo_forward": (64, 256),
    "grpo_loss": (32, 256),
    "moe_combine": (48, 0),
    "moe_combine_backward": (48, 0),
    "moe_permute": (40, 0),
    "rms_norm_backward": (128, 256),
    "rms_norm_forward": (88, 256),
    "rms_norm_weight": (40, 2048),
    "rope_rotate": (64, 0),
    "router_backward": (40, 0),
    "router_forward": (64, 0),
    "swiglu_backward": (48, 0),
    "swiglu_forward": (40, 0),
}
# Attention's kernels keep a warp's sums of 16 rows in registers, so wide heads need all of them.
ATTENTION = {
    "flash_attention_backward_keys": (255, 0),
    "flash_attention_backward_queries": (255, 0),
    "flash_attention_forward": (255, 0),
    "flash_attention_row_sum": (32, 0),
}
# Of experts, with tiles of many rows; of few rows they take at most FEW
GROUPED = {
    "grouped_linear_forward": (128, 16),  # 256 threads: two blocks by registers
    "grouped_linear_input": (128, 16),
    "grouped_linear_weight": (128, 0),
}
BUDGET |= ATTENTION | GROUPED
FEW = {"bfloat16": 64, "float32": 64, "float64": 88}
# Decoding's sums of values lie in registers, too; in bfloat16 at V3's widths it takes DECODING.
BUDGET |= {"mla_decode_combine": (40, 0), "mla_decode_split": (255, 0)}
DECODING = {(64, 32): 232, (32, 16): 136}  # registers, by rows of a block and keys of a tile
V3 = {  # registers in bfloat16 at V3's widths, where nothing is spilled
    (192, 128): {"backward_keys": 255, "backward_queries": 216, "forward": 168},
    (128, 128): {"backward_keys": 240, "backward_queries": 168, "forward": 176},
}
# Most bytes per thread that the others spill, stores and loads, on any target: by type and widths,
# of the backward's keys and queries and of the forward
SPILLS = {
    ("bfloat16", 256, 256): (1364, 0, 0),
    ("bfloat16", 16, 16): (112, 0, 0),
    ("bfloat16", 32, 16): (0, 0, 0),
    ("float32", 192, 128): (96, 0, 0),
    ("float32", 128, 128): (0, 0, 0),
    ("float32", 256, 256): (6080, 0, 0),
    ("float32", 16, 16): (16, 0, 32),
    ("float32", 32, 16): (24, 20, 0),
    ("float64", 192, 128): (6468, 924, 0),
    ("float64", 128, 128): (4048, 0, 0),
    ("float64", 256, 256): (65952, 6832, 13272),
    ("float64", 16, 16): (56, 44, 0),
    ("float64", 32, 16): (0, 0, 220),
}
# in bfloat16, for two blocks of V3's widths on a multiprocessor
IN_BFLOAT16 = {"rms_norm_backward": 96}
ON_SM_120 = {"cross_entropy_loss": 40}  # registers where ptxas takes more there than elsewhere
SHOWN = TARGETS if FULL else TARGETS[:-1]  # sm_120's PTX is sm_100's: test-full shows it
HELD = {
    "float64": 7,
    "float32": 6,
    "bfloat16": 3,
}  # chunks of 16 bytes of an RMSNorm's row that a thread holds
ROUND_NOTHING = ("router", "grpo", "embedding")  # to bfloat16: results are float32, or are copied


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of kernels."""
    monkeypatch.setenv("REFIMPL_KERNELS", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


PLAIN = [stem for stem in STEMS if variants(stem, "float32") == [()]]  # of no widths


@without_a_device
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("stem", PLAIN)
def test_compiles_within_budget(stem: str, storage: str) -> None:
    """No spills, no stack, registers and shared memory within the budget."""
    for target in SHOWN:
        module = compile_kernel(stem, target, storage)
        entries = re.findall(r"\.entry (\w+)\(", module.ptx)
        assert set(module.usage) == set(entries) > set()
        assert f".target {target}\n" in module.ptx
        assert module.cubin.read_bytes()[:4] == b"\x7fELF"
        assert "warning" not in module.log
        for kernel, usage in module.usage.items():
            registers, shared = BUDGET[kernel]
            if storage == "bfloat16":
                registers = IN_BFLOAT16.get(kernel, registers)
            if target == "sm_120":
                registers = ON_SM_120.get(kernel, registers)
            where = f"{kernel} in {storage} for {target}: {usage}"
            assert usage.spills == usage.stack == 0, where
            assert 0 < usage.registers <= registers, where
            assert usage.shared <= shared, where


@without_a_device
@pytest.mark.parametrize("target", TARGETS if FULL else ["sm_90"])
@pytest.mark.parametrize("storage", STORAGE if FULL else ["bfloat16"])
def test_attention_within_budget(storage: str, target: str) -> None:
    """In bfloat16 at V3's widths no spills and no stack; for the others the bytes of SPILLS. The
    types but bfloat16 and the other targets: in test-full, 4 minutes of compiling."""
    for widths in COMPILED_AHEAD if FULL else V3:
        defines = tiles(storage, *widths).defines
        module = compile_kernel("flash_attention", target, storage, defines)
        assert set(module.usage) == set(ATTENTION)
        assert "warning" not in module.log
        for kernel, usage in module.usage.items():
            where = f"{kernel} in {storage}, {widths}, for {target}: {usage}"
            short = kernel.removeprefix("flash_attention_")
            assert usage.shared == 0, where  # all of it is the launch's
            assert usage.registers <= ATTENTION[kernel][0], where
            if short == "row_sum":
                spills = 0
            elif storage == "bfloat16" and widths in V3:
                assert usage.registers <= V3[widths][short], where
                spills = 0
            else:
                order = ("backward_keys", "backward_queries", "forward").index(short)
                spills = SPILLS[storage, *widths][order]
            assert usage.spills <= spills, where
            assert spills or usage.stack == 0, where
        if storage == "bfloat16":
            for instruction in (
                "mma.sync.aligned.m16n8k16",
                "ldmatrix",
                "cp.async.cg",
                "cvt.rn.bf16x2",
            ):
                assert instruction in module.ptx
        assert not re.search(r"\batom\.|\bred\.|\.tf32", module.ptx)


@without_a_device
@pytest.mark.parametrize("storage", STORAGE)
def test_experts_within_budget(storage: str) -> None:
    """No spills and no stack, with either tiling; the targets but sm_90 in test-full."""
    for tiling in TILINGS[storage]:
        for target in TARGETS if FULL else ("sm_90",):
            module = compile_kernel("grouped_linear", target, storage, tiling.defines)
            assert set(module.usage) == set(GROUPED)
            assert "warning" not in module.log
            for kernel, usage in module.usage.items():
                where = f"{kernel} in {storage}, {tiling}, for {target}: {usage}"
                registers, shared = GROUPED[kernel]
                if tiling == TILINGS[storage][0]:
                    registers = FEW[storage]
                assert usage.spills == usage.stack == 0, where
                assert 0 < usage.registers <= registers, where
                assert usage.shared <= shared, where
            assert ("mma.sync.aligned.m16n8k16" in module.ptx) == (storage == "bfloat16")
            assert not re.search(r"\batom\.|\bred\.|\.tf32", module.ptx)


@without_a_device
@pytest.mark.parametrize("target", SHOWN)
@pytest.mark.parametrize("storage", STORAGE if FULL else ["bfloat16"])
def test_decoding_within_budget(storage: str, target: str) -> None:
    """No spills and no stack at any width that is compiled ahead; in bfloat16 at V3's widths on
    tensor cores, by copies that pass the registers by."""
    for shape in tiles_ahead(storage):
        v3 = shape.value_width == 512
        if not (v3 or FULL):
            continue
        module = compile_kernel("mla_decode", target, storage, shape.defines)
        assert "warning" not in module.log
        for kernel, usage in module.usage.items():
            where = f"{kernel} in {storage}, {shape}, for {target}: {usage}"
            assert usage.spills == usage.stack == usage.shared == 0, where
            assert usage.registers <= BUDGET[kernel][0], where
        if storage == "bfloat16" and v3:
            most = DECODING[shape.rows, shape.keys]
            assert module.usage["mla_decode_split"].registers <= most, target
            for instruction in ("mma.sync.aligned.m16n8k16", "ldmatrix", "cp.async.cg"):
                assert instruction in module.ptx
        assert not re.search(r"\batom\.|\bred\.|\.local", module.ptx)


def _body(ptx: str) -> str:
    """But for what names the target."""
    return re.sub(r"(?m)^(\.target|//).*$", "", ptx)


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("stem", STEMS if FULL else PLAIN)
def test_what_is_executed_stands_for_all_targets(stem: str, storage: str) -> None:
    """sm_80's and sm_90a's PTX is sm_90's, which these tests execute; so is sm_100's, whose code is
    other, and which sm_120's is."""
    for defines in variants(stem, storage):
        for target in set(SHOWN) - set(EXECUTED):
            executed = "sm_100" if target == "sm_120" else "sm_90"
            bodies = [
                _body(compile_kernel(stem, name, storage, defines).ptx)
                for name in (target, executed)
            ]
            assert bodies[0] == bodies[1], target


def test_every_kernel_has_a_budget() -> None:
    text = re.sub(r"__launch_bounds__\([\w, *]+\)", "", "".join(sources().values()))
    declared = re.findall(r'extern "C" __global__ void\s+(\w+)\(', text)
    assert sorted(declared) == sorted(BUDGET)


def test_every_gpu_has_the_shared_memory() -> None:
    """48 KB per block, which needs no asking; sm_86, sm_89 and sm_120 have 99 KB at most, of which
    attention's tiles are made (its own test)."""
    scores = router.WARPS * (2 * router.MOST_SLOTS + router.WARP) * 8  # of float64, in the launch
    assert max(shared for _, shared in BUDGET.values()) + scores <= 48 * 1024


@without_a_device
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("stem", PLAIN)
def test_ptx(stem: str, storage: str) -> None:
    """16-byte accesses where rows allow them, past L1 where data is read once, and nothing that
    flushes to zero."""
    code = compile_kernel(stem, "sm_90", storage).ptx
    held = HELD[storage]
    angles = 4 if storage == "bfloat16" else 2
    # loads past L1, loads through it (what is read again soon, or is written in place), stores
    accesses = {
        "adamw_update": (0, 4, 3),
        "rms_norm_forward": (held, held, held),
        "rms_norm_backward": (2 * held, held, held),
        "swiglu_forward": (2, 0, 1),
        "swiglu_backward": (3, 0, 2),
        "rope_rotate": (2, angles, 2),
        "cross_entropy_forward": (4, 0, 0),
        "cross_entropy_backward": (0, 4, 4),
        "cross_entropy_in_place": (0, 8, 4),
        "embedding_gather": (0, 1, 1),
        "embedding_runs": (4, 0, 0),
        "embedding_backward": (8, 0, 0),
        "moe_permute": (1, 0, 5),  # four of a token's rows in one turn, the rest singly
        "moe_combine": (4, 0, 1),
        "moe_combine_backward": (1, 1, 1),
    }
    kinds = ("ld.global.nc.L1::no_allocate.L2::256B.v4.u32", "ld.global.v4.u32", "st.global.v4.u32")
    for part in code.split(".entry ")[1:]:
        kernel = re.split(r"\W", part)[0]
        assert tuple(map(part.count, kinds)) == accesses.get(kernel, (0, 0, 0)), kernel
    assert ("cvt.rn.bf16.f32" in code) == (storage == "bfloat16" and stem not in ROUND_NOTHING)
    assert not re.search(r"\.local|\batom\.|\bred\.", code)
    assert not re.search(r"(add|mul|fma|sub)\.(rn\.)?ftz", code)


@without_a_device
def test_machine_code() -> None:
    """What ptxas made of it: 128-bit loads that prefetch 256 bytes (on sm_80 it makes that 128),
    stores, shuffles; in test-full in every type."""
    for storage in STORAGE if FULL else ("bfloat16",):
        for target in SHOWN:
            code = "".join(machine_code(compile_kernel("rms_norm", target, storage)).values())
            fetched = "LTC128B" if target == "sm_80" else "LTC256B"
            for instruction in (
                f"LDG.E.NA.{fetched}.128.CONSTANT",
                "LDG.E.128",
                "STG.E.128",
                "SHFL.BFLY",
            ):
                assert instruction in code, (
                    f"{instruction} is not in rms_norm for {target}, {storage}"
                )


@pytest.mark.parametrize("storage", STORAGE)
def test_loads_are_on_their_way_at_once(storage: str) -> None:
    """Nothing waits for a chunk before all chunks of the thread's row, or of the rows that it loads
    ahead, are asked for."""
    held = HELD[storage]
    wanted = {
        "adamw": {"adamw_update": 4},
        "rms_norm": {
            "rms_norm_forward": 2 * held,
            "rms_norm_backward": 3 * held,
        },  # x and w; x, dy and w
        "swiglu": {"swiglu_forward": 2, "swiglu_backward": 3},
        "rope": {"rope_rotate": 6 if storage == "bfloat16" else 4},
        "moe": {"moe_combine": 4, "moe_combine_backward": 2},
        "cross_entropy": dict.fromkeys(
            (f"cross_entropy_{part}" for part in ("forward", "backward", "in_place")), 4
        ),
        "embedding": {"embedding_runs": 4, "embedding_backward": 4},
    }
    quick = ("sm_80", "sm_100") if storage == "bfloat16" else ("sm_100",)
    for stem, kernels in wanted.items():
        for target in TARGETS if FULL else quick:
            code = machine_code(compile_kernel(stem, target, storage))
            found = {kernel: loads_in_flight(code[kernel]) for kernel in kernels}
            if (stem, storage) == ("rope", "float64") and target not in ("sm_100", "sm_120"):
                found["rope_rotate"] += 1  # there ptxas asks for the last sine once it has x
            assert found == kernels, f"for {target}"


def test_readme_of_kernels() -> None:
    """Every kernel is in its table, and the planted mistakes are as many as it says."""
    page = (SOURCE / "README.md").read_text()
    for kernel in BUDGET:
        assert f"`{kernel}`" in page
    assert f"{sum(map(len, PLANTED.values()))} planted mistakes" in page


def test_unknown_targets() -> None:
    with pytest.raises(ValueError, match=f"target must be one of {', '.join(TARGETS)}, got sm_70"):
        compile_kernel("rope", "sm_70", "float32")


def test_a_kernel_that_does_not_compile_is_an_error() -> None:
    with pytest.raises(
        BuildError, match=r"(?s)broken.cu does not compile with .*sm_90.*identifier \"nothing\""
    ):
        build("broken", "sm_90", "float32", "__global__ void broken() { nothing(); }")


def test_nothing_is_written_into_shared_bytes(
    kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty log is one byte, which NVRTC writes: not into the one b" " that the whole process
    shares."""
    monkeypatch.setattr(compile, "OPTIONS", ())
    module = build("one", "sm_90", "float32", 'extern "C" __global__ void one(int* x) { *x = 1; }')
    assert module.log == ""
    assert [bytes([i])[0] for i in range(256)] == list(range(256))
    assert b" " == b"\x20"


def test_what_was_compiled_is_read_back(
    kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another source, header, option or release of NVRTC is another entry."""
    source = (
        '#define STORAGE_FLOAT32 1\n#include "common.cuh"\nextern "C" __global__ void '
        "one(real* x) { *x = 1; }"
    )
    first = build("one", "sm_90", "float32", source)
    assert first.cubin.parent.parent == kernels
    assert first.cubin.parent.name.endswith(f"-nvrtc{compile.nvrtc_version()}")
    monkeypatch.setattr(compile, "_run", lambda *_: pytest.fail("compiled again"))
    assert build("one", "sm_90", "float32", source) == first
    monkeypatch.setattr(compile, "_run", lambda *_: (b"ptx", b"cubin", b"log"))
    assert build("one", "sm_80", "float32", source).ptx == "ptx"
    assert build("one", "sm_90", "float32", source + "\n").ptx == "ptx"
    assert len(list(kernels.iterdir())) == 3
    changed = tmp_path / "source"
    changed.mkdir()
    (changed / "common.cuh").write_text("// another\n")
    with monkeypatch.context() as inner:
        inner.setattr(compile, "SOURCE", changed)
        assert build("one", "sm_90", "float32", source).ptx == "ptx"
    assert len(list(kernels.iterdir())) == 4
    monkeypatch.setattr(compile, "_release", lambda nvrtc: "13.1.2")
    assert build("one", "sm_90", "float32", source).ptx == "ptx"
    assert sorted(x.name for x in kernels.iterdir() if x.name.endswith("-nvrtc13.1.2"))
    assert len(list(kernels.iterdir())) == 5


@without_a_device
def test_compiled_kernels_travel(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one machine compiled, another loads that has no NVRTC; nothing else."""
    made = compile_kernel.__wrapped__("swiglu", "sm_90", "float32")
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert compile_kernel.__wrapped__("swiglu", "sm_90", "float32") == made
    with pytest.raises(CouldNotRun, match=r"^CUDA C needs NVRTC"):
        compile_kernel.__wrapped__("swiglu", "sm_80", "float32")


def test_release_of_nvrtc() -> None:
    """To the last number, which nvrtcVersion leaves out."""
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    assert re.fullmatch(rf"{major}\.{minor}\.\d+", compile.nvrtc_version())
    with pytest.raises(
        RuntimeError, match=r"PTX that does not name its compiler: b'\.version 9\.0"
    ):
        compile.release_of(b".version 9.0")


def test_no_nvrtc_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(
        CouldNotRun, match=r"^CUDA C needs NVRTC: pip install -e '\.\[kernels\]' [^\n]*$"
    ):
        build("one", "sm_90", "float32", "")
