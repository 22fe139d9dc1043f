"""Is a port right? Services for people who write DeepSeek-V3 elsewhere.

A port's tensors beside the truth, part by part: a verdict, and the name of the mistake.

    from refimpl import port
    verdict = port.compare_folders("mine.safetensors", "truth")
    assert verdict.ok, verdict

Functions of any array library beside ours:

    import torch
    result = port.check("mla", my_forward, my_backward, array=torch.from_dlpack)
    assert result.ok, result

Each name is imported when it is first used. Read truth.py (what a port is held against), parts.py
(in which order), compare.py and verdict.py first.
"""

TYPE_CHECKING = False  # a type checker takes it for True
if TYPE_CHECKING:
    from .functions import Result, check
    from .report import Verdict
    from .truth import Truth
    from .verdict import compare_folders

__all__ = ["Result", "Truth", "Verdict", "check", "compare_folders"]

_HOMES = {
    "Result": "functions",
    "Truth": "truth",
    "Verdict": "report",
    "check": "functions",
    "compare_folders": "verdict",
}

if not TYPE_CHECKING:

    def __getattr__(name):
        from importlib import import_module

        if name in _HOMES:
            return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
