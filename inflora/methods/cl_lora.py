"""CL-LoRA: continual low-rank adaptation (He et al., CVPR 2025, arXiv 2505.24816)."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from inflora import lora
from inflora.classifier import ClassCounts
from inflora.data.tasks import Task
from inflora.method import Method
from inflora.parts.distillation import check_distillation
from inflora.parts.prototypes import CosineClassifier, Prototypes, class_means, cosine
from inflora.parts.snapshot import Snapshot


class CLLoRA(Method):
    """Branches that all tasks share in the early blocks, branches of each task's own in the late ones, and class means per path.

    The shared `lora_A` is random with orthonormal rows and frozen; the shared `lora_B` goes on training, and distillation after the early
    blocks keeps it near its state before the task, the more so the rows that were large. A task's own branches have trained weights per
    block and projection. An image takes the path of every task; a class is scored by the cosine with its mean in its task's path.

    Loss: two steps per batch. From the second task on first `distillation_weight` times the cross-entropy between the early scores of
    before and of now; then cross-entropy over the task's classes plus `orthogonality` times the mean |cosine| between its block weights and
    those of earlier tasks. Both use a temporary cosine classifier. For a task of one class the cross-entropies are zero.

    Trains, on queries and values, per early block 2 * embed_dim * rank floats, per late block 4 * embed_dim * rank + 2, and the temporary
    classifier. Stores the late ones for every task, one copy of the early ones, and embed_dim floats per class.

    Official code: github.com/JiangpengHe/CL-LoRA (there `lora_A` and `lora_B` are swapped). It computes the second loss before the first
    step and differentiates it after; here the images pass again in between. Its block weights have a third row, of keys, which no layer
    reads but which takes part in the cosine; here there is none.

    Args:
        backbone: a timm vision transformer without head, of at least two blocks.
        rank: of every branch, in 1..embed_dim.
        shared_blocks: share of the blocks with shared branches, in (0, 1); the first ones, at least one, and not all.
        distillation_weight: of the first loss.
        temperature: of the distillation.
        orthogonality: weight of the cosines between block weights.

    Raises:
        ValueError: if an argument is out of range or does not fit the backbone.
    """

    def __init__(
        self, backbone: Any, *, rank: int, shared_blocks: float, distillation_weight: float, temperature: float, orthogonality: float
    ) -> None:
        super().__init__(backbone)
        depth = len(backbone.blocks)
        if not 0 < shared_blocks < 1 or depth < 2:
            raise ValueError(f"method.shared_blocks={shared_blocks} does not divide {depth} blocks; choose a share above 0 and below 1")
        check_distillation(temperature, distillation_weight)
        if orthogonality < 0:
            raise ValueError(f"method.orthogonality={orthogonality} is negative; choose 0 or more")
        self.distillation_weight, self.temperature, self.orthogonality = distillation_weight, temperature, orthogonality
        self.heads = ClassCounts(self.heads.embed_dim)
        self.num_shared = min(max(1, round(shared_blocks * depth)), depth - 1)
        self._inject(rank)
        self.teacher = Snapshot()
        self.teacher.take(self.shared)
        self.paths = nn.ModuleList()
        self.classifier: CosineClassifier | None = None
        self.prototypes = Prototypes(self.heads.embed_dim)

    def _inject(self, rank: int) -> None:
        query, _, value = (slice(i * self.heads.embed_dim, (i + 1) * self.heads.embed_dim) for i in range(3))
        names = lora.qkv_names(self.backbone)
        lora.check_rank(self.backbone, names, rank)
        rows = (query, value)
        early = lora.inject(self.backbone, names[: self.num_shared], rank, rows=rows, share_A=False)
        lora.inject(self.backbone, names[self.num_shared :], rank, rows=rows, share_A=False, train_A=True, train_scale=True)
        for branch in early.values():
            branch.set_lora_A(orthonormal_rows(branch.lora_A.shape))

    # ---- the parts of the network ----

    @property
    def early(self) -> nn.Module:
        """The blocks with shared branches: tokens -> tokens."""
        return self._part(slice(self.num_shared))

    @property
    def late(self) -> nn.Module:
        """The blocks with branches of each task's own."""
        return self._part(slice(self.num_shared, None))

    def _part(self, which: slice) -> nn.Module:
        blocks: Any = self.backbone.blocks
        return blocks[which].train(blocks.training)  # a new container, which does not know of the mode

    @property
    def shared(self) -> dict[str, Tensor]:
        """name in `early` -> the shared `lora_B`, (2, embed_dim, rank)."""
        return {f"{name}.lora_B": branch.lora_B for name, branch in lora.branches(self.early).items()}

    @property
    def own(self) -> dict[str, Tensor]:
        """name in `late` -> what the current task has of its own."""
        branches = lora.branches(self.late)
        return {f"{name}.{key}": value for name, branch in branches.items() for key, value in branch.named_parameters() if _is_own(key)}

    def embed(self, x: Tensor) -> Tensor:
        """Images to the tokens that enter the first block, as timm's ViT does it."""
        vit: Any = self.backbone
        return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))

    def readout(self, tokens: Tensor) -> Tensor:
        """Tokens of any block to the (B, embed_dim) class token after the final norm."""
        vit: Any = self.backbone
        return vit.forward_head(vit.norm(tokens))

    # ---- a task ----

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.teacher.take(self.shared)
        with torch.no_grad():
            for branch in lora.branches(self.late).values():
                branch.set_lora_A(orthonormal_rows(branch.lora_A.shape))
                branch.lora_B.zero_()
                assert branch.scale is not None
                branch.scale.copy_(torch.empty(len(branch.scale)).uniform_(0.5, 1.5))
        self.classifier = self._make_classifier()

    def _make_classifier(self) -> CosineClassifier:
        return CosineClassifier(self.heads.embed_dim, self.heads.sizes[-1]).to(self.device)

    def param_groups(self) -> list[dict[str, Any]]:
        assert self.classifier is not None
        return [
            {"params": [*self.shared.values(), *self.own.values()], "role": "branch"},
            {"params": list(self.classifier.parameters()), "role": "head"},
        ]

    def loss(self, x: Tensor, y: Tensor) -> Iterator[Tensor]:
        assert self.classifier is not None
        if len(self.paths):
            yield self.distillation_weight * self.distillation_loss(x)
        scores, y = self.classifier(self.features(x)), y - self.num_old_classes
        self.observe(scores, y)
        yield F.cross_entropy(scores, y) + self.orthogonality * self.block_weight_overlap()

    def distillation_loss(self, x: Tensor) -> Tensor:
        """Mean cross-entropy between the softened scores after the early blocks, of before the task and of now.

        The gradient reaches the temporary classifier through both of them, as in the published code.
        """
        assert self.classifier is not None
        tokens = self.embed(x)
        early = functional_call(self.early, self.reassigned(), (tokens,))
        scores = self.classifier(self.readout(early)) / self.temperature
        old_scores = self.classifier(self.readout(self.teacher.call(self.early, tokens))) / self.temperature
        return -(old_scores.softmax(1) * scores.log_softmax(1)).sum(1).mean()

    def reassigned(self) -> dict[str, Tensor]:
        """name -> the shared `lora_B` as they are; the gradient of a row is multiplied by its norm before the task over their mean."""
        shared = self.shared
        return {
            name: shared[name].detach() + (shared[name] - shared[name].detach()) * row_factors(old)
            for name, old in self.teacher.tensors.items()
        }

    def block_weight_overlap(self) -> Tensor:
        """Mean over the earlier tasks of |cos| between the block weights, all in one vector, and theirs; 0 without earlier tasks."""
        current = block_weights(self.own)
        if not len(self.paths):
            return current.new_zeros(())
        old = torch.stack([block_weights(path.tensors) for path in self.paths])  # type: ignore[operator, union-attr, arg-type]
        return F.cosine_similarity(old, current.unsqueeze(0)).abs().mean()

    def end_task(self, task: Task) -> None:
        self.classifier = None
        self._add_path()
        self.prototypes.add(class_means(self.features, task, self.heads.embed_dim, self.device))

    def _add_path(self) -> None:
        path = Snapshot()
        path.take(self.own)
        self.paths.append(path)

    def path_features(self, x: Tensor) -> Iterator[Tensor]:
        """Class token of every finished task's path, (B, embed_dim) each; the early blocks are passed once."""
        tokens = self.early(self.embed(x))
        for path in self.paths:
            yield self.readout(path.call(self.late, tokens))  # type: ignore[operator]

    def predict(self, x: Tensor) -> Tensor:
        means = self.prototypes.means.split(self.heads.sizes[: len(self.paths)])
        return torch.cat([cosine(features, own) for features, own in zip(self.path_features(x), means, strict=True)], dim=1)

    # ---- state ----

    def extra_state(self) -> dict[str, Any]:
        return {"num_paths": len(self.paths), "has_classifier": self.classifier is not None}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.paths = nn.ModuleList()
        for _ in range(state["num_paths"]):
            self._add_path()
        self.classifier = self._make_classifier() if state["has_classifier"] else None


def _is_own(name: str) -> bool:
    return name in ("lora_A", "lora_B", "scale")


def orthonormal_rows(shape: tuple[int, ...]) -> Tensor:
    """(..., rank, dim), the Q of uniform random matrices; drawn on the CPU, so that all devices start alike."""
    return torch.linalg.qr(torch.rand(shape).mT).Q.mT


def row_factors(lora_B: Tensor) -> Tensor:
    """(..., dim, rank) -> (..., dim, 1): 2-norms of the rows over their mean; ones where all rows are zero."""
    norms = lora_B.norm(dim=-1, keepdim=True)
    mean = norms.mean(dim=-2, keepdim=True)
    return torch.where(mean > 0, norms / mean, 1.0)


def block_weights(tensors: dict[str, Tensor]) -> Tensor:
    """All `scale`s in one vector."""
    return torch.cat([value for name, value in tensors.items() if name.endswith("scale")])
