"""CODA-Prompt: prompts decomposed into components."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from inflora.data.tasks import Task
from inflora.parts.prompts import PromptMethod, check_at_least, choose_blocks, half_length


class CodaPrompt(PromptMethod):
    """The prefix of an image is a sum of components, weighted by how their keys see its feature under the unprompted backbone.

    Component m has weight cos(query * attention_m, key_m), with * elementwise; the choice is thus trained end to end. Every task adds
    components, keys and attentions, and the older ones are frozen.

    CODA-Prompt: COntinual Decomposed Attention-based Prompting for Rehearsal-Free Continual Learning, Smith et al., CVPR 2023, arXiv
    2211.13218; code GT-RIPL/CODA-Prompt.

    Loss: cross-entropy over the current task's classes, plus `orthogonality` times the mean over entries of (V V^T - I)^2, for V the
    components, keys and attentions so far of every prompted block.

    Trains: the components, keys and attentions of the current task, the current head. Stores per component and prompted block
    (length + 2) * embed_dim floats; `num_components` of them come in the planned tasks, and more if tasks are added later.

    Readings: the paper's penalty of 0.1 is 0 in its code, which has instead new rows orthogonal to the old ones by Gram-Schmidt; so here by
    default. That code projects on the old rows one by one, as if training had left them orthogonal; here new rows are orthogonal to
    their span. Where `num_components` is no multiple of the tasks, the first tasks get one more (the code drops the rest), and a
    task gets at least one.

    Args:
        backbone: a timm vision transformer without head.
        num_components: components of all planned tasks together.
        length: tokens of a component, even: half before the keys, half before the values.
        blocks: 0-based indices of the prompted blocks; None: the first five twelfths of the depth (0, 1, 2, 3, 4 of 12).
        orthogonality: weight of the penalty.

    Raises:
        ValueError: if an argument is out of range or does not fit the backbone.
    """

    def __init__(self, backbone: Any, *, num_components: int, length: int, blocks: list[int] | None, orthogonality: float) -> None:
        check_at_least(num_components=(num_components, 1), orthogonality=(orthogonality, 0))
        half = half_length(length, "length")
        super().__init__(backbone, blocks=choose_blocks(backbone, blocks, "method.blocks", (0, 5)))
        self.num_components, self.orthogonality = num_components, orthogonality
        self.prompt_shape = (2, half, self.heads.embed_dim)
        self.components = nn.ParameterList()  # one a task: (blocks, m, 2, L, embed_dim)
        self.keys = nn.ParameterList()  # (blocks, m, embed_dim)
        self.attentions = nn.ParameterList()
        # Shares follow the length planned at the first task, also when a finished sequence is continued with further tasks.
        self.planned_tasks: int | None = None

    @property
    def pools(self) -> tuple[nn.ParameterList, nn.ParameterList, nn.ParameterList]:
        return self.components, self.keys, self.attentions

    def shapes(self) -> list[tuple[int, ...]]:
        """Of one row of each pool."""
        return [self.prompt_shape, self.prompt_shape[-1:], self.prompt_shape[-1:]]

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if self.planned_tasks is None:
            self.planned_tasks = task.num_tasks
        count = share(self.num_components, task.index, self.planned_tasks)
        for pool, shape in zip(self.pools, self.shapes(), strict=True):
            none = torch.zeros(len(self.blocks), 0, torch.Size(shape).numel())
            old = torch.cat([none, *(part.detach().flatten(2).cpu() for part in pool)], dim=1)
            new = torch.stack([orthonormal_rows(rows, count) for rows in old])
            pool.append(nn.Parameter(new.unflatten(2, shape).to(self.device)))

    def param_groups(self) -> list[dict[str, Any]]:
        return [
            {"params": [pool[-1] for pool in self.pools], "role": "branch"},
            {"params": list(self.heads.current.parameters()), "role": "head"},
        ]

    def prompts(self, query: Tensor) -> Mapping[int, Tensor]:
        components, keys, attentions = (torch.cat(list(pool), dim=1) for pool in self.pools)
        weights = component_weights(query, keys, attentions)
        return dict(zip(self.blocks, torch.einsum("kbm,km...->kb...", weights, components), strict=True))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        loss = self.local_cross_entropy(self.features(x), y)
        if self.orthogonality:
            loss = loss + self.orthogonality * self.penalty()
        return loss

    def penalty(self) -> Tensor:
        """Mean of (V V^T - I)^2, summed over the three pools and the blocks."""
        with torch.autocast(self.device.type, enabled=False):
            total = torch.zeros((), device=self.device)
            for pool in self.pools:
                rows = torch.cat([part.flatten(2) for part in pool], dim=1)
                total = total + (rows @ rows.mT - torch.eye(rows.shape[1], device=self.device)).square().mean(dim=(1, 2)).sum()
            return total

    def extra_state(self) -> dict[str, Any]:
        return {"num_components": [keys.shape[1] for keys in self.keys], "planned_tasks": self.planned_tasks}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.planned_tasks = state["planned_tasks"]
        for name, shape in zip(("components", "keys", "attentions"), self.shapes(), strict=True):
            empty = (torch.zeros(len(self.blocks), count, *shape, device=self.device) for count in state["num_components"])
            setattr(self, name, nn.ParameterList(empty))


def share(total: int, index: int, parts: int) -> int:
    """How many of `total` things the part `index` gets; the first parts get one more, each gets at least one, also beyond the last."""
    return max(1, total // parts + (index < total % parts))


def component_weights(query: Tensor, keys: Tensor, attentions: Tensor) -> Tensor:
    """cos(query * attention_m, key_m) without the product of every query with every attention: (blocks, B, m), in float32.

    Args:
        query: (B, D).
        keys, attentions: (blocks, m, D).
    """
    with torch.autocast(query.device.type, enabled=False):
        directions = nn.functional.normalize(keys, dim=-1)
        norms = (query.square() @ attentions.square().mT).clamp_min(1e-24).sqrt()
        return query @ (attentions * directions).mT / norms


def orthonormal_rows(old: Tensor, count: int) -> Tensor:
    """Random unit rows, each orthogonal to all rows of `old` and to each other, by Gram-Schmidt; (count, n) on the CPU.

    Where no direction is left a row is random.

    Args:
        old: (m, n), on the CPU.
    """
    size = old.shape[1]
    basis = torch.linalg.qr(old.double().T).Q.T
    rows = []
    for row in torch.randn(count, size, dtype=torch.float64):
        if len(basis) < size:
            for _ in range(2):  # once more, for what rounding left
                row = row - basis.T @ (basis @ row)
        rows.append(row / row.norm())
        basis = torch.cat([basis, rows[-1][None]])
    return torch.stack(rows).float()
