"""Several processes, the same gradients: data, expert and context parallel over MPI (mpi4py).

Derivation: derivations/parallel.md."""
