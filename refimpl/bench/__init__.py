"""Speed and memory of the kernels on a GPU, against what the card itself can do; ``refimpl bench``.

`rows` says what is measured and the least bytes that must move, `measure` how, `results` what is
kept and how it is shown, `run` puts them together. All but the device's own part (`device`) runs,
and is tested, without one.
"""

RUNS = 30  # samples of each number; at least 20
