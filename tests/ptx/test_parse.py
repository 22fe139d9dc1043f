"""What cannot be read."""

from __future__ import annotations

import numpy as np
import pytest

from ptx import PTXError, run
from ptx.written import kernel

UNREADABLE = {
    ".local .align 4 .b8 stack[16];": "line 17: can't read '.local .align 4 .b8 stack",
    ".shared .align 4 .v4 s[4];": "can't read the variable '.align 4 .v4 s",
    ".reg .b128 %q;": r"\.reg \.b128 %q: such a type",
    "{ .reg .b32 %r1; }": "or a name that is taken",
}


@pytest.mark.parametrize("body", UNREADABLE)
def test_what_cannot_be_read(body: str) -> None:
    with pytest.raises(PTXError, match=UNREADABLE[body]):
        run(kernel(body), "k", 1, 32, [np.zeros(1, np.uint32)])


def test_functions_are_not_read() -> None:
    with pytest.raises(PTXError, match=r"can't read '\.func' at the top of a module"):
        run(kernel("", extra=".func f() { ret; }"), "k", 1, 32, [np.zeros(1, np.uint32)])
