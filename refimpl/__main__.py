"""``python -m refimpl`` is the command line."""

from .cli import main

main()
