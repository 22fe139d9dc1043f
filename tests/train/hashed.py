"""The command line with a hash of each answer in the place of the rules, so that the answers of a
model that knows nothing get rewards that differ: ``python -m train.hashed grpo …``."""

from __future__ import annotations

import refimpl.train.grpo
from refimpl.cli import main

from train.kill import by_hash

if __name__ == "__main__":
    refimpl.train.grpo.score = by_hash
    main()
