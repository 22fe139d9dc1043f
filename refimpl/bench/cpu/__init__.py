"""Speed and memory on a CPU, ours beside other libraries'; ``refimpl bench --cpu``.

`problems` says what is computed and from which numbers, `rows` at which sizes, `columns` who
computes it. A column is a process of its own (`worker`, `ours`); `driver` starts them and asks,
`run` gives them turns, `results` keeps what was found, `growth` fits its curves, `plot` draws them.
"""
