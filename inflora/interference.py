"""How much a task disturbs what the older ones rely on: a measurement, never used by a method.

I[t, j, l] = ||dW_t H_jl||_F / ||W_(t-1) H_jl||_F, where dW_t is the change of block l's effective key and value weights during task t, and
H_jl the inputs of that layer for 64 fixed test images of the older task j, under the weights before task t.
"""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from inflora import lora
from inflora.data.tasks import Task
from inflora.parts.collective import sum_over_processes

NUM_IMAGES = 64


class InterferenceProbe:
    """Keeps the backbone as it was before a task, and compares it with the one after."""

    def __init__(self, num_images: int = NUM_IMAGES) -> None:
        self.num_images = num_images

    def before(self, backbone: nn.Module) -> None:
        """Remember the backbone's effective weights, on the CPU: they are needed again only after the task."""
        self._before = lora.merged_copy(backbone).eval().cpu()  # whatever mode a run that goes on finds it in: no dropout

    @torch.no_grad()
    def after(self, backbone: nn.Module, older_tasks: Sequence[Task]) -> list[list[float]] | None:
        """I[t, j, l] as nested lists over older tasks j and blocks l; None if there is no older task or the weights did not change."""
        if not older_tasks:
            return None
        device = next(backbone.parameters()).device
        before, after = self._before.to(device), lora.merged_copy(backbone)
        layers = _key_value_layers(before)
        new_layers = dict(after.named_modules())
        old = {name: _key_value_weight(layer) for name, layer in layers.items()}
        change = {name: _key_value_weight(new_layers[name]) - old[name] for name in layers}
        if not any(delta.any() for delta in change.values()):
            return None
        return [self._ratios(before, layers, old, change, task) for task in older_tasks]

    def _ratios(
        self, before: nn.Module, layers: dict[str, nn.Module], old: dict[str, Tensor], change: dict[str, Tensor], task: Task
    ) -> list[float]:
        device = next(before.parameters()).device
        dtype = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        sums = torch.zeros(len(layers), 2, dtype=dtype, device=device)

        def listen(row: int, name: str) -> None:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                h = inputs[0].float()
                for column, weight in enumerate((change[name], old[name])):
                    sums[row, column] += (h @ weight.T).to(dtype).square().sum()

            handles.callback(layers[name].register_forward_pre_hook(hook).remove)

        *_, last = layers.values()  # in the order of the blocks
        with ExitStack() as handles:
            for row, name in enumerate(layers):
                listen(row, name)
            for x, _ in task.test_batches(limit=self.num_images):
                if len(x):
                    lora.run_until(last, before, x)
        sum_over_processes(sums)
        return (sums[:, 0] / sums[:, 1]).sqrt().tolist()


def _key_value_layers(backbone: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in backbone.named_modules() if name.endswith("attn.qkv")}


def _key_value_weight(layer: nn.Module) -> Tensor:
    """(2 * embed_dim, embed_dim): the key and value rows of the fused projection."""
    weight = layer.weight.detach().float()  # type: ignore[operator, union-attr]
    return weight[weight.shape[0] // 3 :]
