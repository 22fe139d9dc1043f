"""What the command line turns into one line and exit code 2."""


class CouldNotRun(Exception):
    """The command could not do its work; the message is one line that says why and what to do."""
