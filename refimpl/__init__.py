"""DeepSeek-V3/R1 in NumPy and CuPy: every gradient derived by hand and checked.

``refimpl.ops`` holds one file per op, ``refimpl.model`` the whole model made of them,
``refimpl.config`` its shapes and conventions, ``refimpl.check`` the gradient checker. Three
functions to begin with are here too: ``preset`` gives a config by its name, ``forward`` the loss,
``backward`` every gradient.

Each name is imported when it is first used, and needs NumPy alone.
"""

TYPE_CHECKING = False  # a type checker takes it for True
if TYPE_CHECKING:
    from . import check, config, model, ops
    from .config import preset
    from .model import backward, forward

__all__ = ["__version__", "backward", "check", "config", "forward", "model", "ops", "preset"]

__version__ = "0.1.0"  # as in CHANGELOG.md

if not TYPE_CHECKING:

    def __getattr__(name):
        from importlib import import_module

        home = {"backward": "model", "forward": "model", "preset": "config"}.get(name)
        if home is not None:
            return getattr(import_module(f"{__name__}.{home}"), name)
        if name in __all__:
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
