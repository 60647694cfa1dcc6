"""State that grows, and sums over processes."""

from typing import Any

import torch
from torch import Tensor, nn

from inflora.data.tasks import Task
from inflora.parts.collective import sum_over_processes
from my_method.method import MyMethod


class NearestMean(MyMethod):
    """Scores an image by its distance to the mean feature that each class had when its task ended."""

    def __init__(self, backbone: Any, *, strength: float) -> None:
        super().__init__(backbone, strength=strength)
        self.means = nn.ParameterList()  # (classes, embed_dim) for each task

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        sums = torch.zeros(task.num_classes, self.heads.embed_dim, device=self.device)
        for x, y in task.batches("test", stream="means"):
            if len(x):  # one of several processes may get nothing of a batch
                sums.index_add_(0, y - task.num_old_classes, self.features(x).float())
        counts = (task.train_labels - task.num_old_classes).bincount(minlength=task.num_classes)
        self.means.append(sum_over_processes(sums) / counts.clamp(min=1).to(sums).unsqueeze(1))

    def predict(self, x: Tensor) -> Tensor:
        means = torch.cat(list(self.means))
        return -(self.features(x).float().unsqueeze(1) - means).square().sum(2)

    def extra_state(self) -> dict[str, Any]:
        return {"num_means": len(self.means)}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        sizes = self.heads.sizes[: state["num_means"]]  # the heads have been rebuilt by now
        self.means = nn.ParameterList(torch.zeros(size, self.heads.embed_dim, device=self.device) for size in sizes)
