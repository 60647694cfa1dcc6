"""EWC: elastic weight consolidation (Kirkpatrick et al., PNAS 2017, arXiv 1612.00796), and its form for low-rank branches."""

from typing import Any, Literal

import torch
from torch import Tensor

from inflora import lora
from inflora.data.tasks import Task
from inflora.parts.collective import sum_over_processes
from inflora.parts.snapshot import Snapshot
from inflora.parts.tuning import TunedMethod

VARIANTS = ("full", "factors", "product")


class EWC(TunedMethod):
    """A quadratic penalty holds each weight where the older tasks left it, as firmly as its Fisher information says they rely on it.

    Loss: cross-entropy over the current task's classes + `penalty_weight` / 2 * sum of F * (change since the last task)^2. After each task
    F <- `decay` * F + F of the task (online EWC), with F the mean squared gradient of the log-likelihood of the true labels under the
    softmax of the loss, over augmented training images, in float32.

    Variants:
        full: every weight of the backbone trains and is held.
        factors: one branch on keys and values goes on training; both factors are held, each for itself.
        product: EWC-LoRA (Zheng et al., ICLR 2026, arXiv 2602.17559; code yaoyz96/low-rank-cl): a fresh branch per task, folded into the
            weights afterwards; held is its product, with F per entry of the key and value weights.

    Trains besides: the current head; old heads are frozen, so they need no penalty. Stores between tasks: full, twice the backbone (F and
    anchor); factors, 3 * 4 * num_blocks * rank * embed_dim floats; product, 2 * num_blocks * embed_dim^2 of F, and one branch. Nothing
    grows but the heads.

    Readings: `fisher=sample` squares the gradient of each image, as the definition has it; `fisher=batch` that of the mean over a
    training batch, as the EWC-LoRA code (and PyCIL) does, which is smaller by up to the batch size: penalty weights do not carry over.
    That code adds the factors of the branches, B + B_new and A + A_new, whose product has cross terms no loss has seen; here the product
    is folded in exactly. PyCIL also clips F at 1e-4, averages it over tasks, and trains all heads.

    Args:
        backbone, rank, blocks: see `TunedMethod`.
        variant: see above.
        penalty_weight: lambda.
        decay: of the older tasks' F, in [0, 1].
        fisher: "sample" or "batch".
        fisher_images: about so many images of a task for F, in whole batches; None: all.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        backbone: Any,
        *,
        variant: Literal["full", "factors", "product"],
        rank: int,
        blocks: list[int] | None,
        penalty_weight: float,
        decay: float,
        fisher: Literal["sample", "batch"],
        fisher_images: int | None,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"method.variant={variant} is not known; choose one of {', '.join(VARIANTS)}")
        if fisher not in ("sample", "batch"):
            raise ValueError(f"method.fisher={fisher} is not known; choose sample or batch")
        if penalty_weight < 0:
            raise ValueError(f"method.penalty_weight={penalty_weight} is negative; choose 0 or more")
        if not 0 <= decay <= 1:
            raise ValueError(f"method.decay={decay} is out of range; choose 0 (only the last task counts) to 1 (all count alike)")
        if fisher_images is not None and fisher_images < 1:
            raise ValueError(f"method.fisher_images={fisher_images} is below 1; choose a number of images, or null for all")
        super().__init__(backbone, variant="full" if variant == "full" else "peft", rank=rank, blocks=blocks)
        self.is_product = variant == "product"
        self.penalty_weight, self.decay = penalty_weight, decay
        self.fisher_form, self.fisher_images = fisher, fisher_images
        self.fisher, self.anchor = Snapshot(), Snapshot()

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if self.is_product:
            for branch in lora.branches(self.backbone).values():
                branch.reset_lora_A()  # lora_B is zero since the last merge

    def param_groups(self) -> list[dict[str, Any]]:
        return [
            {"params": list(self.tuned.values()), "role": "branch"},
            {"params": list(self.heads.current.parameters()), "role": "head"},
        ]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        loss = self.local_cross_entropy(self.features(x), y)
        return loss if self.fisher.is_empty else loss + self.penalty()

    def penalty(self) -> Tensor:
        """Of the change since the last task; a scalar."""
        with torch.autocast(self.device.type, enabled=False):
            changes = self.changes()
            total = sum((fisher * changes[name].square()).sum() for name, fisher in self.fisher.tensors.items())
        return self.penalty_weight / 2 * torch.as_tensor(total)

    def changes(self) -> dict[str, Tensor]:
        """name -> how far each held tensor is from where the last task left it."""
        if self.is_product:
            return {name: lora.delta_weight(branch)[self._rows] for name, branch in lora.branches(self.backbone).items()}
        anchors = self.anchor.tensors
        return {name: parameter - anchors[name] for name, parameter in self.tuned.items()}

    @property
    def _rows(self) -> slice:
        """Keys and values of the fused projection."""
        return slice(self.heads.embed_dim, None)

    # ---- Fisher information ----

    def end_task(self, task: Task) -> None:
        if self.is_product:
            lora.merge(self.backbone)
        new, old = self.fisher_information(task), self.fisher.tensors
        self.fisher.take({name: self.decay * old[name] + value if name in old else value for name, value in new.items()})
        if not self.is_product:
            self.anchor.take(self.tuned)

    def fisher_information(self, task: Task) -> dict[str, Tensor]:
        """name -> diagonal of the empirical Fisher information of the task, for every held tensor."""
        held = {name: branch.weight for name, branch in lora.branches(self.backbone).items()} if self.is_product else self.tuned
        weights = list(held.values())
        trained = [weight.requires_grad for weight in weights]
        for weight in weights:
            weight.requires_grad_(True)
        totals = [torch.zeros_like(weight) for weight in weights]
        num_images = 0
        batches = task.batches("train", stream="fisher")
        with torch.autocast(self.device.type, enabled=False):
            for step, (x, y) in enumerate(batches):
                if self.fisher_images is not None and num_images >= self.fisher_images:
                    break
                size = batches.global_size(step)
                num_images += size
                if self.fisher_form == "sample":
                    for image, label in zip(x.unsqueeze(1), y.unsqueeze(1), strict=True):  # none where a process has no images
                        for total, gradient in zip(totals, self._gradients(image, label, weights), strict=True):
                            total.add_(gradient.square())
                else:  # the gradient of the mean over the batch, whose images several processes share
                    own = self._gradients(x, y, weights) if len(x) else [torch.zeros_like(weight) for weight in weights]
                    for total, gradient in zip(totals, own, strict=True):
                        total.add_(sum_over_processes(gradient * (len(x) / size)).square(), alpha=size)
        for weight, is_trained in zip(weights, trained, strict=True):
            weight.requires_grad_(is_trained)
        self.take_training_hits()  # these images were no training
        if self.fisher_form == "sample":
            for total in totals:
                sum_over_processes(total)
        rows = self._rows if self.is_product else slice(None)
        return {name: total[rows] / num_images for name, total in zip(held, totals, strict=True)}

    def _gradients(self, x: Tensor, y: Tensor, weights: list[Tensor]) -> list[Tensor]:
        """Of the mean log-likelihood, up to its sign."""
        gradients = torch.autograd.grad(self.local_cross_entropy(self.features(x), y), weights, allow_unused=True)
        return [torch.zeros_like(weight) if gradient is None else gradient for weight, gradient in zip(weights, gradients, strict=True)]

    # ---- state ----

    def diagnostics(self) -> dict[str, Any]:
        """Size of the Fisher information, without which `penalty_weight` says nothing."""
        values = self.fisher.tensors.values()
        return {
            "fisher_mean": (sum(value.sum() for value in values) / sum(value.numel() for value in values)).item(),  # type: ignore[union-attr]
            "fisher_max": max(value.max().item() for value in values),
        }

    def extra_state(self) -> dict[str, Any]:
        return {"fisher": self.fisher.shapes(), "anchor": self.anchor.shapes()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.fisher.set_shapes(state["fisher"], self.device)
        self.anchor.set_shapes(state["anchor"], self.device)
