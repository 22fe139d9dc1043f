"""Truths to diagnose against, and ports that hold them: right ones, and ones with a planted bug."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import refimpl.grads.steps as steps
from refimpl.checkpoint import Checkpoint, save_checkpoint
from refimpl.checkpoint.tensor_file import read_tensor_file
from refimpl.config import ModelConfig, preset
from refimpl.grads import GRPO, Request, write_gradients
from refimpl.model import Route
from refimpl.parameters import parameter_shapes
from refimpl.port.truth import Truth

ACTIVATIONS = "*"
