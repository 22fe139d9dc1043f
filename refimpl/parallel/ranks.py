"""What the ranks of a grid do together in a training step, and how a state is spread over them.

A rank computes the gradients of its own parts of a batch; every tensor's gradients are added up
over the ranks that hold it, in their order, each rank summing an equal slice and taking AdamW's
step on it alone (its moments exist nowhere else: ZeRO-1); then the new slices are gathered.
Sources: Rajbhandari et al., ZeRO (1910.02054) section 5; DeepSeek-V3 (2412.19437) section 3.2.
Derivation: derivations/parallel.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..array import Array, library
from ..batch import Whole
from ..config import ModelConfig
from ..errors import CouldNotRun
from ..ops import Ops
from ..optimizer import AdamW, Moments, clip_global_norm
from ..parameters import is_stacked
from ..splits import Part, added, counts
from .experts import held, spread_experts
from .grid import Grid, even, share
from .group import Group
from .ring import ring

__all__ = ["Ranks"]

Tensors = dict[str, Array]


class Ranks:
    """This rank and the others. All methods are collective.

    Args:
        world: all ranks of ``grid``.
    """

    def __init__(self, grid: Grid, world: Group) -> None:
        self.grid, self.world = grid, world
        self.rank = rank = world.rank
        self.pieces = world.split(grid.row(rank))
        self.holders = world.split(rank // grid.expert)
        self.replicas = world.split(grid.holder(rank))

    # A forward and a backward

    def ops(self, ops: Ops, config: ModelConfig) -> Ops:
        """The table of ``ops`` for this rank's parts."""
        if self.grid.expert > 1:
            ops = spread_experts(ops, self.holders, even(config.experts, self.grid.expert))
        if self.grid.context == 1:
            return ops
        if config.conventions.blind_query == "mean":
            raise CouldNotRun(
                "must be 1 if blind_query is mean: blind queries read all keys",
                argument="context_parallel",
            )
        return ring(ops, self.pieces)

    def held(self, params: Mapping[str, Array], config: ModelConfig) -> Mapping[str, Any]:
        """This rank's parameters, as `forward` takes them."""
        return held(params, config) if self.grid.expert > 1 else params

    def whole(self, parts: Sequence[Part], config: ModelConfig) -> Whole:
        """The counts of the batch of which each rank has these ``parts``."""
        return added(self.world.gather(added([counts(part, config) for part in parts])))

    def total(self, value: float) -> float:
        """The sum over all ranks, in their order."""
        return float(sum(self.world.gather(value)))

    # Gradients and a step

    def reduced(self, grads: Tensors) -> Tensors:
        """Of every tensor this rank's slice of the gradient of the whole batch, flat."""
        return self._reduced(grads, stacked=False) | self._reduced(grads, stacked=True)

    def _reduced(self, grads: Tensors, *, stacked: bool) -> Tensors:
        group = self._group(stacked)
        own = {name: g for name, g in grads.items() if self._is_spread(name) == stacked}
        sums, *others = group.swap(
            [{name: _slice(g, r, group.size) for name, g in own.items()} for r in range(group.size)]
        )
        for more in others:
            sums = {name: sums[name] + more[name] for name in sums}  # (parallel.6)
        return sums

    def step(
        self,
        params: Tensors,
        grads: Tensors,
        moments: Moments,
        optimizer: AdamW,
        learning_rate: float,
    ) -> Moments:
        """AdamW's step on the slices of this rank, ``grads`` and ``moments``; then every rank's
        new slices are in ``params``, in place."""
        slices = {name: self._of(params[name], name) for name in grads}
        moments = optimizer.update(slices, grads, moments, learning_rate)
        for stacked in (False, True):
            group = self._group(stacked)
            own = {name: x for name, x in slices.items() if self._is_spread(name) == stacked}
            for rank, theirs in enumerate(group.gather(own) if group.size > 1 else ()):
                for name, x in theirs.items():
                    _slice(params[name], rank, group.size)[...] = x
        return moments

    def clip(self, grads: Tensors, max_norm: float) -> float:
        """`clip_global_norm` of slices: the norm is that of all of them."""
        return clip_global_norm(grads, max_norm, together=self.total)

    # A state: on every rank what it holds, or whole on the first

    def own_parameters(self, params: Mapping[str, Array], config: ModelConfig) -> Tensors:
        """What this rank holds of whole parameters: all but the experts of others."""
        mine = self.grid.experts(self.rank, config)
        return {
            name: x[mine].copy() if self._is_spread(name) else x.copy()
            for name, x in params.items()
        }

    def own_moments(self, moments: Moments, config: ModelConfig) -> Moments:
        """This rank's slices of whole moments."""
        mine = self.grid.experts(self.rank, config)

        def own(name: str, x: Array) -> Array:
            return self._of(x[mine] if self._is_spread(name) else x, name).copy()

        kept = ({name: own(name, x) for name, x in each.items()} for each in moments[1:])
        return Moments(moments.step, *kept)

    def whole_parameters(self, params: Tensors) -> Tensors | None:
        """All parameters, on the first rank."""
        if self.rank >= self.grid.expert:
            return None  # others have the same
        parts = self.holders.collect({n: x for n, x in params.items() if self._is_spread(n)})
        if parts is None:
            return None
        joined = _joined(parts)
        return {name: joined.get(name, x) for name, x in params.items()}

    def whole_gradients(self, slices: Tensors, params: Tensors) -> Tensors | None:
        """All gradients, or other tensors like the parameters, from every rank's slices, on the
        first rank."""
        own: Tensors = {}
        for stacked in (False, True):
            names = [name for name in slices if self._is_spread(name) == stacked]
            parts = self._group(stacked).collect({name: slices[name] for name in names})
            if parts is not None:
                shapes = {name: params[name].shape for name in names}
                own |= {name: x.reshape(shapes[name]) for name, x in _joined(parts).items()}
        found = self.whole_parameters(own)
        return None if found is None else {name: found[name] for name in slices}

    def whole_moments(self, moments: Moments, params: Tensors) -> Moments | None:
        kept = [self.whole_gradients(dict(each), params) for each in moments[1:]]
        if any(each is None for each in kept):
            return None
        return Moments(moments.step, *(each or {} for each in kept))

    # Which ranks share a tensor, and which slice of it is whose

    def _is_spread(self, name: str) -> bool:
        return self.grid.expert > 1 and is_stacked(name)

    def _group(self, stacked: bool) -> Group:
        return self.replicas if stacked else self.world

    def _of(self, x: Array, name: str) -> Array:
        group = self._group(self._is_spread(name))
        return _slice(x, group.rank, group.size)


def _slice(x: Array, rank: int, ranks: int) -> Array:
    """A rank's slice of a tensor, flat; a view."""
    return x.reshape(-1)[share(x.size, ranks, rank)]


def _joined(parts: list[Tensors]) -> Tensors:
    """The parts of each tensor behind one another."""
    return {
        name: library(x).concat([part[name] for part in parts], axis=0)
        for name, x in parts[0].items()
    }
