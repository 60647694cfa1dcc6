"""SimpleCIL: class means of the pretrained features (Zhou et al., IJCV 2024, arXiv 2303.07338)."""

from typing import Any

from torch import Tensor

from inflora.classifier import ClassCounts
from inflora.data.tasks import Task
from inflora.method import Method
from inflora.parts.prototypes import Prototypes, class_means


class SimpleCIL(Method):
    """A nearest-mean classifier on the frozen backbone: nothing trains.

    The prototype of a class is the mean of its features over the training images, prepared as test images; an image's score is the cosine
    with it. Neither the order of the classes nor the number of tasks matters.

    Official code: github.com/zhoudw-zdw/RevisitingCIL; also in LAMDA-PILOT, with weights fine-tuned on ImageNet-1k, which are worth several
    points. Loss: none. Stores embed_dim floats per class.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__(backbone)
        self.heads = ClassCounts(self.heads.embed_dim)
        self.prototypes = Prototypes(self.heads.embed_dim)

    def param_groups(self) -> list[dict[str, Any]]:
        return []

    def end_task(self, task: Task) -> None:
        self.prototypes.add(class_means(self.features, task, self.heads.embed_dim, self.device))

    def predict(self, x: Tensor) -> Tensor:
        return self.prototypes(self.features(x))
