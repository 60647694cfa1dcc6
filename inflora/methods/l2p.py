"""L2P: learning to prompt."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from inflora.parts.prompts import PromptMethod, PromptTokens, check_at_least, choose_blocks, cosines, half_length, uniform_parameter

VARIANTS = ("prefix", "prompt")


class L2P(PromptMethod):
    """A pool of prompts with keys: each image gets the prompts whose keys are nearest to its feature under the unprompted backbone.

    Learning to Prompt for Continual Learning, Wang et al., CVPR 2022, arXiv 2112.08654; code google-research/l2p (JAX).

    Variants:
        prefix: "L2P++" of CODA-Prompt (Smith et al., CVPR 2023), which the InfLoRA paper compares with: half of each prompt's tokens go
            before the keys, half before the values of the chosen blocks' attention; the class token is classified.
        prompt: the original: the chosen prompts' tokens enter before the first block, without position embedding; the mean of the
            final norm's outputs at their places is classified.

    Loss: cross-entropy over the current task's classes, plus `key_weight` times the sum over an image's chosen keys of 1 - cos(query, key),
    averaged over images.

    Trains: prompts, keys and the current head. Stores pool_size * (length + 1) * embed_dim floats per prompted block; nothing grows but the
    heads.

    Readings: the public codes may replace the choice of each image by a vote of the batch, at test too; here no image sees another. CODA's
    code sums the key loss over the batch, and pairs every query with the keys chosen by any image; here each query meets its own. The
    prompts start in [0, 1] as CODA has it (prefix), or in [0, 0.01] as the original (prompt); so do the keys.

    Args:
        backbone: a timm vision transformer without head.
        variant: see above.
        pool_size: prompts in the pool.
        length: tokens of a prompt; even for prefix.
        top_k: prompts an image gets.
        blocks: 0-based indices of the prompted blocks, each with a pool and keys of its own; [0] for prompt.
        key_weight: of the key loss.

    Raises:
        ValueError: if an argument is out of range or does not fit the backbone.
    """

    def __init__(
        self,
        backbone: Any,
        *,
        variant: Literal["prefix", "prompt"],
        pool_size: int,
        length: int,
        top_k: int,
        blocks: list[int],
        key_weight: float,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"method.variant={variant} is not known; choose one of {', '.join(VARIANTS)}")
        check_at_least(pool_size=(pool_size, 1), length=(length, 1), key_weight=(key_weight, 0))
        if not 1 <= top_k <= pool_size:
            raise ValueError(f"method.top_k={top_k} does not fit method.pool_size={pool_size}; choose 1..{pool_size}")
        blocks = choose_blocks(backbone, blocks, "method.blocks", (0, 1))
        is_prefix = variant == "prefix"
        if not is_prefix and blocks != [0]:
            raise ValueError(f"method.blocks={blocks}: method.variant=prompt has its tokens before block 0; choose [0]")
        super().__init__(backbone, blocks=blocks if is_prefix else [])
        self.variant, self.top_k, self.key_weight, self.prompted_blocks = variant, top_k, key_weight, blocks
        parts = (2, half_length(length, "length")) if is_prefix else (1, length)
        bound, embed_dim = 1.0 if is_prefix else 0.01, self.heads.embed_dim
        self.pool = uniform_parameter((len(blocks), pool_size, *parts, embed_dim), 0, bound, self.device)
        self.keys = uniform_parameter((len(blocks), pool_size, embed_dim), 0, bound, self.device)
        self.tokens = None if is_prefix else PromptTokens(backbone)

    def match(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine similarity with the chosen keys, and which these are: (blocks, B, top_k) each, best first."""
        best = cosines(query, self.keys).topk(self.top_k, dim=-1)
        return best.values, best.indices

    def chosen(self, indices: Tensor) -> dict[int, Tensor]:
        """block -> (B, 2 or 1, top_k * length of a part, embed_dim), from (blocks, B, top_k)."""
        found = (pool[index].transpose(1, 2).flatten(2, 3) for pool, index in zip(self.pool, indices, strict=True))
        return dict(zip(self.prompted_blocks, found, strict=True))

    def prompts(self, query: Tensor) -> dict[int, Tensor]:
        return self.chosen(self.match(query)[1])

    def prompted(self, x: Tensor, prompts: Mapping[int, Tensor]) -> Tensor:
        if self.tokens is None:
            return super().prompted(x, prompts)
        tokens = prompts[0].squeeze(1)
        # Past the backbone's own call, which pools the class token; a compiled backbone runs this as it is written.
        with self.tokens.inserted(tokens):
            return self.backbone.forward_features(x)[:, 1 : 1 + tokens.shape[1]].mean(dim=1)  # type: ignore[operator]

    def param_groups(self) -> list[dict[str, Any]]:
        return [
            {"params": [self.pool, self.keys], "role": "branch"},
            {"params": list(self.heads.current.parameters()), "role": "head"},
        ]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        similarity, indices = self.match(self.query(x))
        features = self.prompted(x, self.chosen(indices))
        key_loss = (1 - similarity).sum(dim=(0, 2)).mean()
        return self.local_cross_entropy(features, y) + self.key_weight * key_loss
