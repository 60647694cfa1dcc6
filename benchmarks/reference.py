"""InfLoRA on small images, written to be obviously right and nothing else: the slow side of every comparison.

All float32, as the formulas have it. All branches are kept, and their dense products summed anew in every forward pass; attention is
written out; second moments are a running mean on the CPU, batch by batch; every subspace comes from a full singular value decomposition;
images go through Pillow and answers are counted one by one. Of the package only the random streams are used (`inflora.seeding`), so that
both sides see the same batches.

Source: Liang & Li 2024 (InfLoRA, arXiv 2404.00228) with the conventions of the published code: singular vectors of P C, energies of C
(`method.energy=gram`), a first task that stops one direction short of its threshold.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torchvision.transforms.functional as pil
from torch import Tensor, nn

from inflora.seeding import generator, seed_everything, stream_seed, uniform

Batch = tuple[Tensor, Tensor]
"""Images (B, 3, S, S) and labels (B,)."""
Memory = tuple[str, Tensor]
"""("remove", basis of the protected space) or ("retain", basis of the free one)."""


class PlainImages:
    """The batches of a task sequence in the transform `shift`, made image by image.

    Args:
        train, test: uint8 images (N, 3, H, W) and their labels (N,).
        classes: the labels of each task.
        size: S, height and width of the network's input.
        normalization: mean and standard deviation, per channel.
    """

    def __init__(
        self,
        train: Batch,
        test: Batch,
        *,
        classes: Sequence[Sequence[int]],
        size: int,
        normalization: tuple[Sequence[float], Sequence[float]],
        seed: int,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.train, self.test, self.classes, self.size, self.normalization = train, test, classes, size, normalization
        self.seed, self.batch_size, self.device = seed, batch_size, device

    def training(self, task: int, stream: str, epoch: int = 0) -> Iterator[Batch]:
        """A shuffled pass over a task's training images, each shifted at random and reflected at its border."""
        images, labels = self.train
        rows = torch.cat([(labels == label).nonzero().flatten() for label in self.classes[task]])
        rows = rows[torch.randperm(len(rows), generator=generator(self.seed, f"{stream}:order", task, epoch))]
        key, reach = stream_seed(self.seed, f"{stream}:augment", task, epoch), self.size // 8
        for part in rows.split(self.batch_size):
            views = []
            for row in part:
                top, left = (int(draw * (2 * reach + 1)) for draw in uniform(key, row.view(1), 2)[0].tolist())
                padded: Any = pil.pad(self._resized(images[row]), [reach], padding_mode="reflect")
                views.append(self._to_input(pil.crop(padded, top, left, self.size, self.size)))
            yield torch.stack(views).to(self.device), labels[part].to(self.device)

    def testing(self, task: int) -> Iterator[Batch]:
        """A task's test images, in order."""
        images, labels = self.test
        rows = torch.cat([(labels == label).nonzero().flatten() for label in self.classes[task]])
        for part in rows.split(self.batch_size):
            views = [self._to_input(self._resized(images[row])) for row in part]
            yield torch.stack(views).to(self.device), labels[part].to(self.device)

    def _resized(self, image: Tensor) -> Any:
        """A Pillow image; torchvision declares tensors only."""
        picture: Any = pil.to_pil_image(image)
        return pil.resize(picture, [self.size, self.size])

    def _to_input(self, image: Any) -> Tensor:
        mean, std = map(list, self.normalization)
        return pil.normalize(pil.to_tensor(image), mean, std)


class PlainAttention(nn.Module):
    """Self-attention of a timm block with the branches of all tasks t: key += sum_t (B_k,t A_t) h, value += sum_t (B_v,t A_t) h.

    Attributes:
        lora_A: one (rank, dim) per task.
        lora_B_k, lora_B_v: one (dim, rank) per task.
        moment: (dim, dim) mean of h h^T over the tokens seen while `is_collecting`, on the CPU.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.qkv: nn.Linear = attention.qkv
        self.proj, self.num_heads = attention.proj, attention.num_heads
        self.lora_A: list[Tensor] = []
        self.lora_B_k: list[Tensor] = []
        self.lora_B_v: list[Tensor] = []
        self.is_collecting = False

    def forward(self, h: Tensor, **unused: object) -> Tensor:
        if self.is_collecting:
            num_new = h.shape[0] * h.shape[1]
            new = (h.mT @ h).sum(0).cpu()
            self.moment = (self.moment * self.num_tokens + new) / (self.num_tokens + num_new)
            self.num_tokens += num_new
        query, key, value = self.qkv(h).chunk(3, dim=-1)
        if self.lora_A:
            key = key + F.linear(h, torch.stack([B @ A for B, A in zip(self.lora_B_k, self.lora_A, strict=True)]).sum(0))
            value = value + F.linear(h, torch.stack([B @ A for B, A in zip(self.lora_B_v, self.lora_A, strict=True)]).sum(0))
        query, key, value = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value))
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(dim=-1)
        return self.proj((weights @ value).transpose(1, 2).flatten(2))

    def start_collecting(self) -> None:
        self.is_collecting, self.num_tokens = True, 0
        self.moment = torch.zeros(self.qkv.in_features, self.qkv.in_features)


class PlainInfLoRA:
    """InfLoRA on a copy of a timm vision transformer.

    Args:
        scale: norm of the rows of lora_A.
        num_tasks: planned length of the sequence.
        threshold, threshold_end: share of the energy to protect after the first task, and what the later ones rise towards.
    """

    def __init__(self, vit: Any, *, rank: int, scale: float, num_tasks: int, threshold: float, threshold_end: float) -> None:
        self.vit = copy.deepcopy(vit).requires_grad_(False).eval()
        for block in self.vit.blocks:
            block.attn = PlainAttention(block.attn)
        self.attentions: list[PlainAttention] = [block.attn for block in self.vit.blocks]
        self.rank, self.scale = rank, scale
        self.thresholds = [threshold + (threshold_end - threshold) * t / num_tasks for t in range(num_tasks)]
        self.heads: list[nn.Linear] = []
        self.memories: list[Memory | None] = [None] * len(self.attentions)

    @torch.no_grad()
    def moments(self, batches: Iterable[Batch]) -> list[Tensor]:
        """Per block, the second moment of the inputs of its attention."""
        for attention in self.attentions:
            attention.start_collecting()
        for x, _ in batches:
            self.vit(x)
        for attention in self.attentions:
            attention.is_collecting = False
        return [attention.moment for attention in self.attentions]

    def begin_task(self, moments: list[Tensor], head: nn.Linear) -> None:
        """A new head, and a new branch designed from the moments of the task's inputs."""
        self.add_branch([design(C, memory, self.rank, self.scale) for C, memory in zip(moments, self.memories, strict=True)], head)

    def add_branch(self, designs: list[Tensor], head: nn.Linear) -> None:
        """A new head and, at zero, a new branch: from now on they train, and nothing else does."""
        for old in self.trained():
            old.requires_grad_(False)
        self.heads.append(head)
        for attention, lora_A in zip(self.attentions, designs, strict=True):
            lora_A = lora_A.to(attention.qkv.weight)
            attention.lora_A.append(lora_A)
            attention.lora_B_k.append(torch.zeros_like(lora_A.mT).requires_grad_())
            attention.lora_B_v.append(torch.zeros_like(lora_A.mT).requires_grad_())

    def trained(self) -> list[Tensor]:
        factors = [factors[-1] for attention in self.attentions for factors in (attention.lora_B_k, attention.lora_B_v) if factors]
        return factors + [parameter for head in self.heads[-1:] for parameter in head.parameters()]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy over the classes of the newest head."""
        num_old = sum(head.out_features for head in self.heads[:-1])
        return F.cross_entropy(self.heads[-1](self.vit(x)), y - num_old)

    def end_task(self, moments: list[Tensor], task: int) -> None:
        """Protect what the task's inputs need."""
        self.memories = [update(memory, C, self.thresholds[task]) for memory, C in zip(self.memories, moments, strict=True)]

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Scores of all seen classes."""
        features = self.vit(x)
        return torch.cat([head(features) for head in self.heads], dim=1)

    def stored_numbers(self) -> int:
        """What is kept beside the pretrained weights."""
        factors = [factor for a in self.attentions for factors in (a.lora_A, a.lora_B_k, a.lora_B_v) for factor in factors]
        heads = [parameter for head in self.heads for parameter in head.parameters()]
        bases = [memory[1] for memory in self.memories if memory is not None]
        return sum(tensor.numel() for tensor in (*factors, *heads, *bases))


def project(C: Tensor, memory: Memory | None) -> Tensor:
    """P C, with P the projector on the space that is not protected."""
    if memory is None:
        return C
    kind, basis = memory
    on_basis = basis @ basis.mT
    return (torch.eye(len(C)) - on_basis if kind == "remove" else on_basis) @ C


def design(C: Tensor, memory: Memory | None, rank: int, scale: float) -> Tensor:
    """lora_A (rank, dim): the leading left singular vectors of P C."""
    U, _, _ = torch.linalg.svd(project(C, memory))
    return scale * U[:, :rank].mT


def update(memory: Memory | None, C: Tensor, threshold: float) -> Memory:
    """DualGPM: protect the fewest leading directions of P C that lift the captured share of C's energy to the threshold."""
    dim = len(C)
    U, S, _ = torch.linalg.svd(project(C, memory))
    shares = S.square() / torch.linalg.svdvals(C).square().sum()
    if memory is None:
        count = max(1, int((shares.cumsum(0) < threshold).sum()))
        return ("remove", U[:, :count]) if 2 * count < dim else ("retain", U[:, count:])
    kind, basis = memory
    count = 0
    while count < dim and (shares[count:].sum() > 1 - threshold if kind == "remove" else shares[count:].sum() >= 1 - threshold):
        count += 1
    if count == 0:
        return memory
    if kind == "retain":
        rest = basis - U[:, :count] @ (U[:, :count].mT @ basis)
        return "retain", torch.linalg.svd(rest)[0][:, : basis.shape[1] - count]
    basis = torch.cat([basis, U[:, :count]], dim=1)[:, :dim]
    return ("remove", basis) if 2 * basis.shape[1] <= dim else ("retain", torch.linalg.svd(basis)[0][:, basis.shape[1] :])


def step(model: PlainInfLoRA, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    """One training step; returns the batch's loss."""
    optimizer.zero_grad()
    loss = model.loss(x, y)
    loss.backward()
    optimizer.step()
    return loss.item()


def evaluate(model: PlainInfLoRA, images: PlainImages, num_tasks: int) -> Tensor:
    """(3, num_tasks) on each task's test images: accuracy, accuracy if the task is given, share assigned to the right task."""
    task_of = {label: task for task, classes in enumerate(images.classes) for label in classes}
    rates = torch.zeros(3, num_tasks, dtype=torch.float64)
    for task in range(num_tasks):
        own, hits = list(images.classes[task]), []
        for x, y in images.testing(task):
            for scores, label in zip(model.predict(x).cpu(), y.tolist(), strict=True):
                answer = int(scores.argmax())
                answer_in_task = own[int(scores[own].argmax())]
                hits.append([answer == label, answer_in_task == label, task_of[answer] == task])
        rates[:, task] = torch.tensor(hits, dtype=torch.float64).mean(0)
    return rates


def run(model: PlainInfLoRA, images: PlainImages, *, epochs: int, lr: float) -> tuple[Tensor, Tensor]:
    """A whole sequence with Adam and the published cosine schedule.

    Returns:
        (T * epochs,) the mean loss of every epoch, and (3, T, T) what `evaluate` gives after each task, zero where there is nothing yet.
    """
    num_tasks, losses = len(images.classes), []
    rates = torch.zeros(3, num_tasks, num_tasks, dtype=torch.float64)
    for task, classes in enumerate(images.classes):
        seed_everything(images.seed, "begin", task)
        head = nn.Linear(model.vit.num_features, len(classes)).to(images.device)
        model.begin_task(model.moments(images.training(task, "moments_before")), head)
        optimizer = torch.optim.Adam(model.trained(), lr=lr)
        for epoch in range(epochs):
            for group in optimizer.param_groups:
                group["lr"] = lr * math.cos(99 * math.pi * max(0, epoch - 1) / (200 * max(1, epochs - 1)))
            epoch_losses = [step(model, optimizer, x, y) for x, y in images.training(task, "fit", epoch)]
            losses.append(sum(epoch_losses) / len(epoch_losses))
        model.end_task(model.moments(images.training(task, "moments_after")), task)
        rates[:, task, : task + 1] = evaluate(model, images, task + 1)
    return torch.tensor(losses), rates
