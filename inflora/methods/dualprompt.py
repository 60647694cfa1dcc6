"""DualPrompt: prompts for all tasks and prompts for each."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from inflora.data.tasks import Task
from inflora.parts.prompts import PromptMethod, check_at_least, choose_blocks, cosines, half_length, uniform_parameter

VARIANTS = ("coda", "original")


class DualPrompt(PromptMethod):
    """G-prompts shared by all tasks in the first blocks, and an E-prompt of each task in the next ones, all of them prefixes.

    A task trains its own E-prompt; at test an image gets that of the task whose key is nearest to its feature without prompts.

    DualPrompt: Complementary Prompting for Rehearsal-free Continual Learning, Wang et al., ECCV 2022, arXiv 2204.04799; code
    google-research/l2p (JAX).

    Variants:
        coda: as CODA-Prompt (Smith et al., CVPR 2023) has it and the InfLoRA paper compares with: a key for every E-block and task, fresh
            E-prompts for every task; prompts and keys start in [0, 1].
        original: one key per task; a task's E-prompt starts as the one before it; the other prompts and the keys start in [0, 0.01].

    Loss: cross-entropy over the current task's classes, plus `key_weight` times 1 - cos(query, key), summed over the keys of the task and
    averaged over images.

    Trains: G-prompts, the current E-prompt and its keys, the current head. Stores num_g * g_length * embed_dim floats, and for every task
    num_e * e_length * embed_dim of prompt and num_e (coda) or 1 (original) times embed_dim of keys.

    Readings: lengths count tokens for keys and values together, as CODA has it (the original's 5 is 10 here). Only the keys of seen tasks
    compete; public codes have a pool planned in advance, with keys not trained yet. CODA's code sums the key loss over the batch. The
    PyTorch port (and PILOT) mixes up keys and values of the images of a batch, and at test may choose by a vote of the batch.

    Args:
        backbone: a timm vision transformer without head.
        variant: see above.
        g_blocks, e_blocks: 0-based indices; None: the first sixth of the depth, and from there to five twelfths (0, 1 and 2, 3, 4 of 12).
        g_length, e_length: tokens of a prompt, even: half before the keys, half before the values.
        key_weight: of the key loss.

    Raises:
        ValueError: if an argument is out of range or does not fit the backbone.
    """

    def __init__(
        self,
        backbone: Any,
        *,
        variant: Literal["coda", "original"],
        g_blocks: list[int] | None,
        e_blocks: list[int] | None,
        g_length: int,
        e_length: int,
        key_weight: float,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"method.variant={variant} is not known; choose one of {', '.join(VARIANTS)}")
        check_at_least(key_weight=(key_weight, 0))
        g_half, e_half = half_length(g_length, "g_length"), half_length(e_length, "e_length")
        chosen_g = choose_blocks(backbone, g_blocks, "method.g_blocks", (0, 2))
        chosen_e = choose_blocks(backbone, e_blocks, "method.e_blocks", (2, 5))
        if set(chosen_g) & set(chosen_e):
            raise ValueError(f"method.g_blocks={chosen_g} and method.e_blocks={chosen_e} overlap; choose different blocks")
        super().__init__(backbone, blocks=[*chosen_g, *chosen_e])
        self.variant, self.g_blocks, self.e_blocks, self.key_weight = variant, chosen_g, chosen_e, key_weight
        self.bound = 1.0 if variant == "coda" else 0.01
        self.e_shape = (len(chosen_e), 2, e_half, self.heads.embed_dim)
        self.key_shape = (len(chosen_e) if variant == "coda" else 1, self.heads.embed_dim)
        self.g_prompt = self._fresh((len(chosen_g), 2, g_half, self.heads.embed_dim))
        self.e_prompts = nn.ParameterList()
        self.keys = nn.ParameterList()

    def _fresh(self, shape: tuple[int, ...]) -> nn.Parameter:
        return uniform_parameter(shape, 0, self.bound, self.device)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        is_copy = self.variant == "original" and len(self.e_prompts) > 0
        self.e_prompts.append(nn.Parameter(self.e_prompts[-1].detach().clone()) if is_copy else self._fresh(self.e_shape))
        self.keys.append(self._fresh(self.key_shape))

    def param_groups(self) -> list[dict[str, Any]]:
        return [
            {"params": [self.g_prompt, self.e_prompts[-1], self.keys[-1]], "role": "branch"},
            {"params": list(self.heads.current.parameters()), "role": "head"},
        ]

    def with_g_prompts(self, e_prompts: Tensor) -> dict[int, Tensor]:
        """block -> (B, 2, L, embed_dim), from the E-prompts (num_e, B, 2, L, embed_dim)."""
        shared = self.g_prompt.unsqueeze(1).expand(-1, e_prompts.shape[1], -1, -1, -1)
        return dict(zip([*self.g_blocks, *self.e_blocks], [*shared, *e_prompts], strict=True))

    def match(self, query: Tensor) -> Tensor:
        """(num_e, B): the task whose key is nearest, for each E-block."""
        keys = torch.stack(list(self.keys), dim=1)  # (1 or num_e, tasks, embed_dim)
        return cosines(query, keys).argmax(dim=-1).expand(len(self.e_blocks), -1)

    def prompts(self, query: Tensor) -> Mapping[int, Tensor]:
        by_block = torch.stack(list(self.e_prompts), dim=1)  # (num_e, tasks, 2, L, embed_dim)
        return self.with_g_prompts(torch.stack([own[task] for own, task in zip(by_block, self.match(query), strict=True)]))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        own = self.e_prompts[-1].unsqueeze(1).expand(-1, len(x), -1, -1, -1)
        features = self.prompted(x, self.with_g_prompts(own))
        key_loss = (1 - cosines(self.query(x), self.keys[-1])).sum(dim=1).mean()
        return self.local_cross_entropy(features, y) + self.key_weight * key_loss

    def extra_state(self) -> dict[str, Any]:
        return {"num_prompts": len(self.keys)}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        count = state["num_prompts"]
        self.e_prompts = nn.ParameterList(torch.zeros(self.e_shape, device=self.device) for _ in range(count))
        self.keys = nn.ParameterList(torch.zeros(self.key_shape, device=self.device) for _ in range(count))
