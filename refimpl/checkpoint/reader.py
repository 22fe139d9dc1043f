"""A checkpoint on disk as our parameters, read a piece at a time."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Conventions, ModelConfig
from ..errors import CouldNotRun
from ..files import expect_folder
from ..parameters import MTP_PROJECTION, is_buffer, is_stacked, layer_name, parameter_shapes
from .config_json import read_block_size, read_config, with_layout
from .files import open_folder
from .fp8 import dequantise, scale_shape
from .names import (
    SCALE,
    abbreviate,
    copied_names,
    fused_names,
    is_ignorable,
    is_of_indexer,
    layer_of,
    stored_names,
    stored_tensors,
    tensor_scales,
)
from .tensor_file import StoredTensor

__all__ = ["Checkpoint"]

CHUNK = 2**18  # numbers that are converted at a time
MOST_MISSING = 200_000  # tensors that are told by name; DeepSeek-V3 has 91,000, with scales


class Checkpoint:
    """The parameters of a folder in Hugging Face's layout, under our names. Nothing is read before
    it is asked for.

    ``config`` is the model's, ``names`` are those of `parameter_shapes`, in its order. Every array
    is NumPy and fresh: of ``dtype``, and float32 for the gates' biases. FP8 weights come multiplied
    by their scales.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: dict[str, StoredTensor],
        block: tuple[int, int],
        dtype: str = "float32",
    ) -> None:
        self.config, self.dtype = config, np.dtype(dtype)
        self._tensors, self._block = tensors, block
        self._shapes = parameter_shapes(config)
        self._stored = {name: stored_names(name, shape) for name, shape in self._shapes.items()}
        self.names = list(self._shapes)

    @classmethod
    def open(
        cls,
        folder: Path | str,
        *,
        dtype: str = "float32",
        conventions: Conventions | None = None,
        mtp: bool = True,
    ) -> Checkpoint:
        """The checkpoint in ``folder``: config.json with model.safetensors, or with shards and
        their index.

        Args:
            dtype: float32 or float64, what floating tensors are converted to.
            conventions: by default `Conventions()`. If config.json says that rotated pairs lie in
                halves, they do.
            mtp: False leaves the MTP layers out, and sets the config's ``mtp_depth`` to 0.

        CouldNotRun names the file or the field that is wrong, or everything at once that is wrong
        with the tensors. Only headers, gate biases and the copies of embedding and head are read,
        the latter to see that they are equal.
        """
        if dtype not in ("float32", "float64"):
            raise CouldNotRun(f"dtype must be float32 or float64, got {dtype}")
        folder = Path(folder)
        expect_folder(folder)
        config, block = read_config(folder / "config.json"), read_block_size(folder / "config.json")
        if conventions is not None:
            config = replace(config, conventions=with_layout(conventions, config.conventions))
        tensors = _split_experts(config, open_folder(folder))
        if config.index_topk is not None:
            tensors = {name: x for name, x in tensors.items() if not is_of_indexer(name)}
        if mtp:
            _expect_mtp(folder, config, tensors)
        else:
            config, tensors = replace(config, mtp_depth=0), _without_mtp(config, tensors)
        _expect_count(folder, config, tensors)
        _check(folder, config, tensors, block)
        checkpoint = cls(config, tensors, block, dtype)
        for name in filter(is_buffer, checkpoint.names):
            if not np.isfinite(checkpoint.tensor(name)).all():
                raise CouldNotRun(
                    f"{tensors[name].path}: {name} must be finite, got NaN or infinity"
                )
        checkpoint._compare_copies()
        return checkpoint

    def tensor(self, name: str) -> np.ndarray:
        """All of a parameter; a layer's experts are stacked [E, …]."""
        return self.piece(name, slice(None))

    def piece(self, name: str, index: Any) -> np.ndarray:
        """``tensor(name)[index]`` along the first axis, and only that is read.

        ``index`` is an integer (one expert), a slice, or integers of any shape (rows of the
        embedding).
        """
        shape = self._shapes[name]
        rows = np.arange(shape[0])[index]
        out = np.empty((*rows.shape, *shape[1:]), np.float32 if is_buffer(name) else self.dtype)
        flat, stored = out.reshape(-1, *shape[1:]), self._stored[name]
        if stored == [name]:
            self._read(name, rows.reshape(-1), flat)
        else:
            every = np.arange(shape[1])
            for slot, expert in enumerate(rows.reshape(-1)):
                self._read(stored[expert], every, flat[slot])
        return out

    def stored(self, name: str, expert: int | None) -> np.ndarray | None:
        """A tensor, or that of one expert, mapped from its file; None for FP8, which has scales,
        and for a whole stack of experts."""
        names = self._stored[name]
        if expert is None and names != [name]:
            return None
        tensor = self._tensors[names[expert or 0]]
        return None if tensor.dtype == "F8_E4M3" else np.asarray(tensor.array())

    @property
    def bytes(self) -> int:
        """Of the tensors in the files."""
        return sum(tensor.data.nbytes for tensor in self._tensors.values())

    def load(self) -> dict[str, np.ndarray]:
        """Every parameter. Peak memory: the arrays themselves and one chunk."""
        return {name: self.tensor(name) for name in self.names}

    def _read(self, stored_name: str, rows: np.ndarray, out: np.ndarray) -> None:
        """Write the ``rows`` of a tensor of the file into ``out`` [len(rows), …], a chunk at a
        time."""
        stored = self._tensors[stored_name]
        source, scale = stored.array(), None
        if stored.dtype == "F8_E4M3":
            scale = self._tensors[stored_name + SCALE].array().astype(np.float32)
            if not np.isfinite(scale).all():
                raise CouldNotRun(
                    f"{stored.path}: {stored_name}{SCALE} must be finite, got NaN or infinity"
                )
        step = max(1, CHUNK // max(1, prod(stored.shape[1:])))
        for start in range(0, len(rows), step):
            chosen, target = rows[start : start + step], out[start : start + step]
            run = (np.diff(chosen) == 1).all()
            values = source[chosen[0] : chosen[-1] + 1] if run else source[chosen]
            try:
                with np.errstate(over="raise", invalid="ignore", under="ignore"):
                    if scale is None:
                        target[...] = values
                    else:
                        dequantise(values, scale, self._block, chosen, target)
            except FloatingPointError as error:
                raise CouldNotRun(
                    f"{stored.path}: {stored_name} has numbers that {out.dtype} can't hold"
                ) from error

    def _compare_copies(self) -> None:
        """CouldNotRun unless every copy of embedding and head equals what it is a copy of."""
        for copy, name in copied_names(self.config).items():
            if copy not in self._tensors:
                continue
            rows, width = self._shapes[name]
            step = max(1, CHUNK // width)
            for start in range(0, rows, step):
                chosen = np.arange(start, min(start + step, rows))
                ours, theirs = (np.empty((len(chosen), width), np.float64) for _ in range(2))
                self._read(name, chosen, ours)
                self._read(copy, chosen, theirs)
                if not np.array_equal(ours, theirs, equal_nan=True):
                    row = int(chosen[np.argmax((ours != theirs).any(axis=1))])
                    why = (
                        "tie_word_embeddings is true" if layer_of(copy) is None else "MTP shares it"
                    )
                    raise CouldNotRun(
                        f"{copy} ({self._tensors[copy].path}) must equal {name} "
                        f"({self._tensors[name].path}), since {why}: row {row} differs"
                    )


def _split_experts(
    config: ModelConfig, tensors: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The tensors, those that hold all experts of a layer taken apart: of each expert the rows of
    gate, up and down, which lie together in the file."""
    shapes = parameter_shapes(config) if fused_names(config).keys() & tensors.keys() else {}
    for fused, ours in fused_names(config).items() if shapes else ():
        count, rows, columns = shapes[ours[0]]
        stored = tensors.get(fused)
        if stored is None or stored.shape != (count, rows * len(ours), columns):
            continue  # `_check` says that it is not a tensor of this config
        tensors = {name: tensor for name, tensor in tensors.items() if name != fused}
        parts = stored.data.reshape(count, len(ours), -1)
        for place, name in enumerate(ours):
            for expert, stored_name in enumerate(stored_names(name, shapes[name])):
                part = StoredTensor(
                    stored.path, stored.dtype, (rows, columns), parts[expert, place]
                )
                tensors[stored_name] = part
    return tensors


def _expect_mtp(folder: Path, config: ModelConfig, tensors: dict[str, StoredTensor]) -> None:
    """CouldNotRun if the config names MTP layers and the files hold nothing of them."""
    if (
        config.mtp_depth
        and tensors
        and not any((layer_of(name) or 0) >= config.layers for name in tensors)
    ):
        raise CouldNotRun(
            f"{folder / 'config.json'} names {config.mtp_depth} MTP layer(s) "
            f"(num_nextn_predict_layers), but no file holds {layer_name(config.layers, '*')}: "
            "open it without MTP"
        )


def _expect_count(folder: Path, config: ModelConfig, tensors: dict[str, StoredTensor]) -> None:
    """CouldNotRun if the config asks for so many more tensors than the files hold that a list of
    the names alone would fill the memory."""
    shapes = parameter_shapes(config).items()
    wanted = sum(shape[0] if is_stacked(name) else 1 for name, shape in shapes)
    if wanted - len(tensors) > MOST_MISSING:
        raise CouldNotRun(
            f"{folder} does not fit its config.json, which asks for {wanted:,} tensors: the files "
            f"hold {len(tensors):,}"
        )


def _without_mtp(config: ModelConfig, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors that belong to no MTP layer; such a layer lies behind the main model's and has an
    ``eh_proj``."""
    modules = set(range(config.layers, config.layers + config.mtp_depth))
    modules |= {layer_of(name) or 0 for name in tensors if name.endswith(f".{MTP_PROJECTION}")}
    modules = {layer for layer in modules if layer >= config.layers}
    return {name: tensor for name, tensor in tensors.items() if layer_of(name) not in modules}


def _check(
    folder: Path, config: ModelConfig, tensors: dict[str, StoredTensor], block: tuple[int, int]
) -> None:
    """CouldNotRun with everything that is missing, unexpected, misshapen, or of a type that can't
    be read."""
    wanted = {name: shape for name, (_, _, shape) in stored_tensors(config).items()}
    copies = {name: wanted[ours] for name, ours in copied_names(config).items() if name in tensors}
    problems = [(name, "is missing") for name in wanted if name not in tensors]
    scales: dict[str, tuple[int, ...]] = {}
    told = set()  # that a message is about already
    for name, shape in (wanted | copies).items():
        if name not in tensors:
            continue
        found = tensors[name]
        if found.shape != shape:
            problems.append((name, f"must have shape {shape}, got {found.shape}"))
        elif found.dtype == "F8_E4M3" and tensors.keys() & tensor_scales(name):
            told |= {name + SCALE, *tensor_scales(name)}
            what = "is FP8 with one scale per tensor (weight_scale): only one per block"
            problems.append((name, f"{what} (weight_scale_inv) can be read"))
        elif found.dtype == "F8_E4M3" and len(shape) == 2:
            scales[name + SCALE] = scale_shape(shape, block)
        elif found.dtype not in ("F64", "F32", "F16", "BF16"):
            problems.append(
                (name, f"must be F32, BF16, F16, F64 or (a matrix) F8_E4M3, got {found.dtype}")
            )
    for name, shape in scales.items():
        if name not in tensors:
            problems.append((name, "is missing"))
        elif tensors[name].shape != shape:
            sizes = f"blocks of {block[0]}×{block[1]}"
            problems.append((name, f"must have shape {shape} ({sizes}), got {tensors[name].shape}"))
        elif tensors[name].dtype not in ("F32", "BF16", "F16", "F8_E8M0"):
            problems.append((name, f"must be F32 or F8_E8M0, got {tensors[name].dtype}"))
    known = wanted.keys() | copies.keys() | scales.keys() | told
    for name, tensor in tensors.items():
        weight = name.removesuffix(SCALE)
        if 0 in tensor.shape:  # transformers writes such for shared experts where there are none
            continue
        if (
            name in known
            or is_ignorable(name)
            or (weight != name and weight in wanted and weight not in tensors)
        ):
            continue
        if weight not in known or weight == name:
            problems.append((name, "is not a tensor of this config"))
        elif tensors[weight].dtype != "F8_E4M3":
            problems.append((name, f"is a scale, but the weight is {tensors[weight].dtype}"))
    if problems:
        raise CouldNotRun(f"{folder} does not fit its config.json: {abbreviate(problems)}")
