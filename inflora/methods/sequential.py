"""LoRA in sequence, without protection."""

from typing import Any, Literal

from inflora.parts.low_rank import LowRankMethod

VARIANTS = ("seqlora", "inclora", "inclora_frozen")


class Sequential(LowRankMethod):
    """Low-rank branches on keys and values, trained on one task after the other with nothing that protects the older ones.

    Variants:
        seqlora: one branch shared by all tasks; both factors train on every task and are never reset.
        inclora: a fresh branch per task, merged into the weights afterwards.
        inclora_frozen: as inclora, but `lora_A` stays at its random start and is shared by k and v: InfLoRA without its design step.

    Trains: the branch and the current head (cross-entropy over the current task's classes). Stores between tasks: the weights, the heads
    and, for seqlora, one branch of 2 * num_blocks * 2 * rank * embed_dim floats; nothing grows but the heads.

    `lora_A` is drawn Kaiming-uniform (a = sqrt 5), `lora_B` starts at zero.

    Source: the baselines "SeqLoRA" and "incremental LoRA" of the low-rank papers; `inclora_frozen` is like the first row of InfLoRA's
    ablation (arXiv 2404.00228), whose `lora_A` is Gaussian. There is no official code. A public one adds up the factors of the tasks
    instead of their products, which mixes the tasks and hurts it; here the products are merged.
    """

    def __init__(
        self, backbone: Any, *, variant: Literal["seqlora", "inclora", "inclora_frozen"], rank: int, blocks: list[int] | None
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"method.variant={variant} is not known; choose one of {', '.join(VARIANTS)}")
        is_frozen = variant == "inclora_frozen"
        super().__init__(backbone, rank=rank, blocks=blocks, share_A=is_frozen, train_A=not is_frozen, merges=variant != "seqlora")
