"""Is a port right? Services for people who write DeepSeek-V3 elsewhere.

    import torch
    from refimpl import port
    result = port.check("mla", my_forward, my_backward, array=torch.from_dlpack)
    print(result)              # one row per tensor
    assert result.ok, result.first_wrong

Each name is imported when it is first used.
"""

TYPE_CHECKING = False  # a type checker takes it for True
if TYPE_CHECKING:
    from .functions import Result, check

__all__ = ["Result", "check"]

_HOMES = {"Result": "functions", "check": "functions"}

if not TYPE_CHECKING:

    def __getattr__(name):
        from importlib import import_module

        if name in _HOMES:
            return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
