"""Frozen copies of named tensors: an old model at the cost of what has changed since, an anchor, an importance per weight."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Snapshot(nn.Module):
    """Tensors under dotted names, kept as buffers: they move with the method, are saved and counted as stored, and never train."""

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Hold copies of these tensors and nothing else."""
        self._buffers.clear()
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "/"), tensor.detach().clone())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """name -> tensor, in the order they were given."""
        return {name.replace("/", "."): tensor for name, tensor in self.named_buffers(recurse=False)}

    @property
    def is_empty(self) -> bool:
        return not self._buffers

    @torch.no_grad()
    def call(self, module: nn.Module, x: Tensor) -> Tensor:
        """`module(x)` with these tensors in the place of its own of the same names, in evaluation mode.

        Call the module itself first in a step: autocast remembers the casts of weights that train, with or without gradients.
        """
        was_training = module.training
        module.eval()
        try:
            return functional_call(module, self.tensors, (x,))
        finally:
            module.train(was_training)

    def shapes(self) -> dict[str, Any]:
        """For the state of a method: what `set_shapes` needs before the tensors are loaded."""
        return {name: list(tensor.shape) for name, tensor in self.tensors.items()}

    def set_shapes(self, shapes: Mapping[str, Any], device: torch.device) -> None:
        """Make room for tensors that are about to be loaded."""
        self.take({name: torch.zeros(shape, device=device) for name, shape in shapes.items()})
