"""Continual learning with pretrained transformers: InfLoRA and its relatives."""

__version__ = "0.1.0"
