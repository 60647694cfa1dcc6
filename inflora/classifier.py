"""Heads that grow by task, and the mere count of classes where something else scores them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Head(nn.Linear):
    """A linear head whose scores are those of its own precision, also where the backbone computes in half of it.

    Scores in bfloat16 are so coarse that many images would have two equal best ones, of which `argmax` takes the older class.
    """

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))


class TaskHeads(nn.Module):
    """One linear head with bias per task, in the order the tasks came; together they score every class seen.

    Each head has PyTorch's default linear initialisation, as in the published InfLoRA runs. Sizes may differ.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.heads = nn.ModuleList()

    def __len__(self) -> int:
        return len(self.heads)

    @property
    def sizes(self) -> list[int]:
        """Classes of each head, oldest first."""
        return [head.out_features for head in self.heads]  # type: ignore[misc]

    @property
    def num_classes(self) -> int:
        return sum(self.sizes)

    @property
    def current(self) -> nn.Linear:
        """The newest head."""
        return self.heads[-1]  # type: ignore[return-value]

    def grow(self, num_classes: int, device: torch.device) -> nn.Linear:
        """Add the head of the next task."""
        head = Head(self.embed_dim, num_classes).to(device)  # drawn on the CPU: the same on every device
        self.heads.append(head)
        return head

    def set_sizes(self, sizes: Sequence[int], device: torch.device) -> None:
        """Make the heads have exactly these sizes, keeping the leading ones that fit: the weights are about to be loaded."""
        if self.sizes[: len(sizes)] != list(sizes[: len(self)]):
            self.heads = nn.ModuleList()
        self.heads = self.heads[: len(sizes)]
        for size in sizes[len(self) :]:
            self.grow(size, device)

    def local(self, features: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """What a loss over the newest head's classes compares: its scores (B, size), and the labels (B,) counted within it.

        With a single class that loss is identically zero and nothing would train, so from the second head on such a head's loss is one
        over all classes, which leaves the older heads as they are.
        """
        if len(self) > 1 and self.current.out_features == 1:
            frozen = ({name: value.detach() for name, value in head.named_parameters()} for head in self.heads[:-1])
            older = [functional_call(head, weights, features) for head, weights in zip(self.heads[:-1], frozen, strict=True)]
            return torch.cat([*older, self.current(features)], dim=1), y
        return self.current(features), y - (self.num_classes - self.current.out_features)

    def forward(self, features: Tensor) -> Tensor:
        """Scores of all seen classes: (B, embed_dim) -> (B, num_classes)."""
        return torch.cat([head(features) for head in self.heads], dim=1)


class ClassCounts(TaskHeads):
    """The number of classes of every task without a head for them: for methods that score with prototypes and the like."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__(embed_dim)
        self._sizes: list[int] = []

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def sizes(self) -> list[int]:
        return list(self._sizes)

    def grow(self, num_classes: int, device: torch.device) -> None:  # type: ignore[override]
        self._sizes.append(num_classes)

    def set_sizes(self, sizes: Sequence[int], device: torch.device) -> None:
        self._sizes = list(sizes)

    def forward(self, features: Tensor) -> Tensor:
        raise AssertionError("there are no heads here: the method has scores of its own")
