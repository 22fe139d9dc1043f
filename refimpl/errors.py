"""The error of a command that could not do its work, and how text from a file is shown."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["CouldNotRun", "printable"]


def printable(text: str) -> str:
    """The text as one line that changes nothing on a terminal: control characters, line ends and
    broken characters, which may come from a file or a path, are escaped."""
    if text.isprintable():
        return text
    return "".join(x if x.isprintable() else repr(x)[1:-1] for x in text)


class CouldNotRun(Exception):
    """The work could not be done; the message is one line, printable, that says why and what to do.

    Args:
        argument: the name of the argument that is wrong; the message begins with it.
        remedy: the name of an argument that helps; the message ends with it.
    """

    def __init__(self, reason: str, *, argument: str = "", remedy: str = "") -> None:
        self.reason = reason
        self.argument = argument
        self.remedy = remedy
        super().__init__(self.spelled({}))

    def spelled(self, names: Mapping[str, str]) -> str:
        """The message with the arguments' names as ``names`` has them (the options of a command
        line)."""
        begin, end = names.get(self.argument, self.argument), names.get(self.remedy, self.remedy)
        return printable(" ".join(part for part in (begin, self.reason, end) if part))
