"""``refimpl kernels``."""

from __future__ import annotations

from itertools import chain

from ..kernels.columns import variants
from ..kernels.compile import STEMS, STORAGE, TARGETS, compile_kernel
from ..kernels.kept import kernels_folder
from ..kernels.numba_cuda import NUMBA_STEMS, NUMBA_STORAGE, compile_numba, kernels_of
from .app import app, console, counted, progress


@app.command()
def kernels() -> None:
    """Compile every kernel for every target, without a GPU.

    They are kept in the folder $REFIMPL_KERNELS, by default in the user's cache; kernels that are
    there already are not compiled again. A machine without compilers can use a copy of that folder:
    set REFIMPL_KERNELS to it. If that machine has compilers, they must be of the same releases.
    """
    twins = [(stem, name) for stem in NUMBA_STEMS for name in kernels_of(stem, NUMBA_STORAGE[0])]
    sources = [(s, kind, made) for s in STEMS for kind in STORAGE for made in variants(s, kind)]
    total = len(TARGETS) * (len(sources) + len(twins) * len(NUMBA_STORAGE))
    entries = set()
    done = 0
    with progress("compiling") as move:
        for target in TARGETS:
            made = (compile_kernel(stem, target, kind, with_) for stem, kind, with_ in sources)
            numba = (compile_numba(*twin, target, kind) for twin in twins for kind in NUMBA_STORAGE)
            for module in chain(made, numba):
                done += 1
                move(f"{module.stem} for {target}", done, total)
                entries.add(module.cubin.parent)  # numba's for sm_90a is that for sm_90
    size = sum(file.stat().st_size for entry in entries for file in entry.iterdir())
    out = console()
    out.print(f"{counted(len(entries), 'module')} for {', '.join(TARGETS)}: {size / 1e6:.1f} MB")
    out.print(f"kept in {kernels_folder()}", markup=False)
