"""The options of commands that several ranks run together."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..errors import CouldNotRun
from ..parallel.grid import make_grid
from ..parallel.launch import is_rank, join, start
from ..parallel.ranks import Ranks

__all__ = ["ContextParallel", "DataParallel", "ExpertParallel", "RankCount", "Timeout", "joined"]

RankCount = Annotated[  # ``--ranks``
    int | None,
    typer.Option(
        help="Number of processes (MPI) to run in: data-parallel × context-parallel; by default 1."
    ),
]
DataParallel = Annotated[  # ``--data-parallel``
    int | None,
    typer.Option(
        help="Number of ranks that share the sequences of a batch; by default ranks / "
        "context-parallel."
    ),
]
ContextParallel = Annotated[  # ``--context-parallel``
    int, typer.Option(help="Number of ranks that share the positions of each sequence.")
]
ExpertParallel = Annotated[  # ``--expert-parallel``
    int,
    typer.Option(help="Number of ranks that hold all experts between them; it divides --ranks."),
]
Timeout = Annotated[  # ``--timeout``, seconds
    float,
    typer.Option(
        help="Seconds that a rank waits for others, or for an evaluation, before all end."
    ),
]


def joined(
    ranks: int | None,
    data_parallel: int | None,
    context_parallel: int,
    expert_parallel: int,
    timeout: float,
) -> Ranks | None:
    """The ranks that these options ask for, this process among them; None for one process alone.

    A process that mpiexec did not start becomes an mpiexec of the same command line.
    """
    if not timeout > 0:
        raise CouldNotRun(f"must be positive, got {timeout:g}", argument="timeout")
    if is_rank():
        return join(
            ranks,
            data=data_parallel,
            context=context_parallel,
            expert=expert_parallel,
            timeout=timeout,
        )
    grid = make_grid(
        1 if ranks is None else ranks,
        data=data_parallel,
        context=context_parallel,
        expert=expert_parallel,
    )
    if grid.ranks > 1:
        start(grid.ranks, sys.argv[1:])
    return None
