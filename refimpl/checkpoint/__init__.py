"""Checkpoints in Hugging Face's layout: config.json and safetensors."""

from .config_json import load_config, read_config

__all__ = ["load_config", "read_config"]
