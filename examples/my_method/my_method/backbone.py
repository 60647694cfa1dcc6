"""A small vision transformer of its own; importing this file makes timm know it."""

from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

default_cfgs = generate_default_cfgs(
    {
        "my_vit.first": {
            "file": str(Path(__file__).with_name("my_vit.safetensors")),  # what backbone.pretrained=true reads
            "input_size": (3, 32, 32),
            "num_classes": 0,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
    }
)


@register_model
def my_vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """For 32 x 32 images: patch 8, width 64, depth 3, 4 heads; 160 thousand parameters."""
    arguments: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4} | kwargs
    return build_model_with_cfg(VisionTransformer, "my_vit", pretrained, **arguments)
