"""Fine-tuning of the layer norms, each task held near where it began."""

from typing import Any

from torch import Tensor, nn

from inflora.data.tasks import Task
from inflora.method import Method


class MyMethod(Method):
    """The layer norms and the current head train; a penalty on their distance pulls the norms back to where the task found them.

    Stores between tasks: the heads, the norms, and as many floats again for where they were. Nothing grows but the heads.
    """

    def __init__(self, backbone: Any, *, strength: float) -> None:
        super().__init__(backbone)
        if strength < 0:
            raise ValueError(f"method.strength={strength} is negative; choose 0 (no penalty) or more")
        self.strength = strength
        self.norms = [p for module in backbone.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()]
        self.register_buffer("start", nn.utils.parameters_to_vector(self.norms).detach())

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)  # adds the task's head
        self.start = nn.utils.parameters_to_vector(self.norms).detach()

    def param_groups(self) -> list[dict[str, Any]]:
        return [
            {"params": self.norms, "role": "branch"},  # trains at optimizer.lr
            {"params": list(self.heads.current.parameters()), "role": "head"},  # at optimizer.head_lr
        ]

    def loss(self, x: Tensor, y: Tensor) -> Any:
        return self.local_cross_entropy(self.features(x), y) + self.strength * self.distance()

    def distance(self) -> Tensor:
        return (nn.utils.parameters_to_vector(self.norms) - self.start).square().sum()
