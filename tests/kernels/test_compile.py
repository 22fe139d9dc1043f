"""`refimpl.kernels.compile`: every kernel for every target and type within its budget, its PTX and
machine code; the cache, and what is said where it cannot compile."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from refimpl.errors import CouldNotRun
from refimpl.kernels import SOURCE, compile
from refimpl.kernels.compile import STEMS, STORAGE, TARGETS, BuildError, build, compile_kernel

from kernel_support import EXECUTED, without_a_device
from kernel_support.planted import PLANTED, sources
from kernel_support.sass import loads_in_flight, machine_code
from support import FULL

# Most registers of a thread (in any type, for any target) and static shared memory of a block in
# bytes.
BUDGET = {
    "adamw_update": (40, 0),
    "cross_entropy_backward": (40, 0),
    "cross_entropy_forward": (96, 256),
    "cross_entropy_loss": (32, 256),
    "embedding_backward": (64, 4096),
    "embedding_gather": (32, 0),
    "embedding_runs": (56, 4096),
    "grpo_forward": (64, 256),
    "grpo_loss": (32, 256),
    "moe_combine": (48, 0),
    "moe_permute": (40, 0),
    "moe_weight_gradient": (48, 0),
    "rms_norm_backward": (128, 256),
    "rms_norm_forward": (88, 256),
    "rms_norm_weight": (40, 2048),
    "rope_rotate": (64, 0),
    "router_backward": (40, 0),
    "router_forward": (64, 0),
    "swiglu_backward": (48, 0),
    "swiglu_forward": (40, 0),
}
HELD = {
    "float64": 7,
    "float32": 6,
    "bfloat16": 3,
}  # chunks of 16 bytes of an RMSNorm's row that a thread holds
ROUND_NOTHING = ("router", "grpo", "embedding")  # to bfloat16: results are float32, or are copied


@without_a_device
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("stem", STEMS)
def test_compiles_within_budget(stem: str, storage: str) -> None:
    """For all four targets: no spills, no stack, registers and shared memory within the budget."""
    for target in TARGETS:
        module = compile_kernel(stem, target, storage)
        entries = re.findall(r"\.entry (\w+)\(", module.ptx)
        assert set(module.usage) == set(entries) > set()
        assert f".target {target}\n" in module.ptx
        assert module.cubin.read_bytes()[:4] == b"\x7fELF"
        assert "warning" not in module.log
        for kernel, usage in module.usage.items():
            registers, shared = BUDGET[kernel]
            where = f"{kernel} in {storage} for {target}: {usage}"
            assert usage.spills == usage.stack == 0, where
            assert 0 < usage.registers <= registers, where
            assert usage.shared <= shared, where


def _body(ptx: str) -> str:
    """But for what names the target."""
    return re.sub(r"(?m)^(\.target|//).*$", "", ptx)


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("stem", STEMS)
def test_what_is_executed_stands_for_all_targets(stem: str, storage: str) -> None:
    """sm_80's and sm_90a's PTX is sm_90's, which these tests execute; so is sm_100's, whose code is
    other."""
    for target in set(TARGETS) - set(EXECUTED):
        assert _body(compile_kernel(stem, target, storage).ptx) == _body(
            compile_kernel(stem, "sm_90", storage).ptx
        )


def test_every_kernel_has_a_budget() -> None:
    text = re.sub(r"__launch_bounds__\([\w, ]+\)", "", "".join(sources().values()))
    declared = re.findall(r'extern "C" __global__ void\s+(\w+)\(', text)
    assert sorted(declared) == sorted(BUDGET)


@without_a_device
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("stem", STEMS)
def test_ptx(stem: str, storage: str) -> None:
    """16-byte accesses where rows allow them, past L1 where data is read once, and nothing that
    flushes to zero."""
    code = compile_kernel(stem, "sm_90", storage).ptx
    held = HELD[storage]
    products = 1 if storage == "bfloat16" else 3
    # loads past L1, loads through it (what is read again soon, or is written in place), stores
    accesses = {
        "rms_norm_forward": (held, held, held),
        "rms_norm_backward": (2 * held, held, held),
        "swiglu_forward": (2, 0, 1),
        "swiglu_backward": (3, 0, 2),
        "rope_rotate": (2, 0, 2),
        "cross_entropy_forward": (4, 0, 0),
        "cross_entropy_backward": (0, 4, 4),
        "embedding_gather": (0, 1, 1),
        "embedding_runs": (4, 0, 0),
        "embedding_backward": (8, 0, 0),
        "moe_permute": (0, 1, 1),
        "moe_combine": (4, 0, 1),
        "moe_weight_gradient": (products, products, 0),
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
        for target in TARGETS:
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
        "rms_norm": {
            "rms_norm_forward": 2 * held,
            "rms_norm_backward": 3 * held,
        },  # x and w; x, dy and w
        "swiglu": {"swiglu_forward": 2, "swiglu_backward": 3},
        "rope": {"rope_rotate": 2},
        "moe": {"moe_combine": 4, "moe_weight_gradient": 2},
        "cross_entropy": {"cross_entropy_forward": 4, "cross_entropy_backward": 4},
        "embedding": {"embedding_runs": 4, "embedding_backward": 4},
    }
    quick = ("sm_80", "sm_100") if storage == "bfloat16" else ("sm_100",)
    for stem, kernels in wanted.items():
        for target in TARGETS if FULL else quick:
            code = machine_code(compile_kernel(stem, target, storage))
            found = {kernel: loads_in_flight(code[kernel]) for kernel in kernels}
            assert found == kernels, f"for {target}"


def test_readme_of_kernels() -> None:
    """Every kernel is in its table, and the planted mistakes are as many as it says."""
    page = (SOURCE / "README.md").read_text()
    for kernel in BUDGET:
        assert f"`{kernel}`" in page
    assert f"{sum(map(len, PLANTED.values()))} planted mistakes" in page


def test_unknown_targets() -> None:
    with pytest.raises(
        ValueError, match="target must be one of sm_80, sm_90, sm_90a, sm_100, got sm_70"
    ):
        compile_kernel("rope", "sm_70", "float32")


def test_a_kernel_that_does_not_compile_is_an_error() -> None:
    with pytest.raises(
        BuildError, match=r"(?s)broken.cu does not compile with .*sm_90.*identifier \"nothing\""
    ):
        build("broken", "sm_90", "float32", "__global__ void broken() { nothing(); }")


def test_nothing_is_written_into_shared_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty log is one byte, which NVRTC writes: not into the one b" " that the whole process
    shares."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compile, "OPTIONS", ())
    module = build("one", "sm_90", "float32", 'extern "C" __global__ void one(int* x) { *x = 1; }')
    assert module.log == ""
    assert [bytes([i])[0] for i in range(256)] == list(range(256))
    assert b" " == b"\x20"


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compiled once is read back; another source, header or option is another entry;
    nothing half-written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = (
        '#define STORAGE_FLOAT32 1\n#include "common.cuh"\nextern "C" __global__ void '
        "one(real* x) { *x = 1; }"
    )
    first = build("one", "sm_90", "float32", source)
    monkeypatch.setattr(compile, "_run", lambda *_: pytest.fail("compiled again"))
    assert build("one", "sm_90", "float32", source) == first
    monkeypatch.setattr(compile, "_run", lambda *_: (b"ptx", b"cubin", b"log"))
    assert build("one", "sm_80", "float32", source).ptx == "ptx"
    assert build("one", "sm_90", "float32", source + "\n").ptx == "ptx"
    folder = tmp_path / "refimpl" / "kernels"
    assert len(list(folder.iterdir())) == 3
    assert first.cubin.parent.parent == folder
    changed = tmp_path / "source"
    changed.mkdir()
    (changed / "common.cuh").write_text("// another\n")
    monkeypatch.setattr(compile, "SOURCE", changed)
    assert build("one", "sm_90", "float32", source).ptx == "ptx"
    assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("name", compile.FILES)
def test_a_spoiled_cache_is_made_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file cut short, changed in one bit, empty or gone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    contents = b"ptx", b"cubin", b"log"

    def build_it() -> tuple[bytes, ...]:
        module = compile.kept("one", "sm_90", "float32", "all", lambda: contents)
        return module.ptx.encode(), module.cubin.read_bytes(), module.log.encode()

    build_it()
    (folder,) = (tmp_path / "refimpl" / "kernels").iterdir()
    file = folder / name
    whole = file.read_bytes()
    for spoiled in (whole[:-1], bytes([whole[0] ^ 1]) + whole[1:], b"", None):
        file.unlink()
        if spoiled is not None:
            file.write_bytes(spoiled)
        assert build_it() == contents
        assert file.read_bytes() == whole
        assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("where", ["refimpl", "refimpl/kernels"])
def test_a_cache_that_cannot_be_written(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / where).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / where).write_text("a file")
    with pytest.raises(
        CouldNotRun,
        match=r"^compiled kernels are kept in .*refimpl.kernels, which .* XDG_CACHE_HOME",
    ):
        compile.kept("one", "sm_90", "float32", "all", lambda: (b"ptx", b"cubin", b"log"))
    assert (tmp_path / where).read_text() == "a file"


def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if self.name == "log":
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CouldNotRun, match=r"cannot be written \(No space left on device\)"):
        compile.kept("one", "sm_90", "float32", "all", lambda: (b"ptx", b"cubin", b"log"))
    assert list((tmp_path / "refimpl" / "kernels").iterdir()) == []


def test_no_nvrtc_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(
        CouldNotRun, match=r"^CUDA C needs NVRTC: pip install -e '\.\[kernels\]' [^\n]*$"
    ):
        build("one", "sm_90", "float32", "")
