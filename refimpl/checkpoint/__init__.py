"""Checkpoints in Hugging Face's layout: config.json and safetensors."""

from .config_json import load_config, read_config
from .reader import Checkpoint
from .writer import save_checkpoint, write_random

__all__ = ["Checkpoint", "load_config", "read_config", "save_checkpoint", "write_random"]
