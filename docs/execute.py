"""Execute every notebook of docs/notebooks and keep what it printed and drew, for the site to show:
``python docs/execute.py``, which is ``make notebooks``.

A notebook that raises, or that takes more than 30 s of processor time, fails. The outputs are kept
in build/notebooks; ``cached`` says whether those of all notebooks, as they are now, are there.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from tempfile import TemporaryDirectory
from typing import Any

from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from myst_nb.core.read import is_myst_markdown_notebook, myst_nb_reader_plugin
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from traitlets.config import Config

__all__ = ["KEPT", "MOST_SECONDS", "NOTEBOOKS", "cached", "main"]

HERE = Path(__file__).parent
NOTEBOOKS = [
    path
    for path in sorted((HERE / "notebooks").glob("*.md"))
    if is_myst_markdown_notebook(path.read_text())
]
KEPT = HERE.parent / "build" / "notebooks"
MOST_SECONDS = 30.0  # of processor time, so that a busy machine changes nothing


def cached() -> bool:
    """Whether every notebook's outputs are kept."""
    if not KEPT.exists():
        return False
    cache = get_cache(KEPT)
    try:
        for path in NOTEBOOKS:
            cache.match_cache_notebook(myst_nb_reader_plugin(str(path)))
    except KeyError:
        return False
    return True


def _error_of(notebook: Any, folder: Path) -> CellExecutionError | None:
    """Execute a notebook in ``folder``, in place; the error that ended it."""
    with TemporaryDirectory() as sockets:  # files, and no open port
        kernel = {"transport": "ipc", "ip": f"{sockets}/kernel"}
        place = {"metadata": {"path": str(folder)}}
        client = NotebookClient(notebook, config=Config(KernelManager=kernel), resources=place)
        try:
            client.execute()
        except CellExecutionError as error:
            return error
    return None


def _used() -> float:
    children = getrusage(RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


def main() -> int:
    """Execute them all, a line per notebook; 1 if one failed or took too long."""
    cache = get_cache(KEPT)
    failed = []
    for path in NOTEBOOKS:
        start, used = time.perf_counter(), _used()
        notebook = myst_nb_reader_plugin(str(path))
        error = _error_of(notebook, path.parent)
        seconds, used = time.perf_counter() - start, _used() - used
        print(f"{path.name}: {seconds:.1f} s, {used:.1f} s of them processor time", flush=True)
        if error is not None:
            print(error, file=sys.stderr)
        elif used > MOST_SECONDS:
            print(f"{path.name}: {MOST_SECONDS:.0f} s are allowed", file=sys.stderr)
        else:
            data = {"execution_seconds": seconds}
            bundle = CacheBundleIn(notebook, str(path), data=data)
            cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)
            continue
        failed.append(path.name)
    print(f"{len(NOTEBOOKS) - len(failed)} of {len(NOTEBOOKS)} notebooks executed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
