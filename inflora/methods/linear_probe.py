"""Frozen backbone, one linear head per task."""

from typing import Any

from torch import Tensor

from inflora.method import Method


class LinearProbe(Method):
    """What the pretrained features give without any adaptation.

    The backbone stays frozen; each task trains its own linear head with cross-entropy over its own classes. Features never move, so what is
    lost over time is confusion between tasks only, never drift.

    Trains: the current head. Stores between tasks: the heads (embed_dim + 1 floats per class).

    Source: no paper of its own; as RanPAC's `joint_linear`, but a head per task instead of one for all.
    """

    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.heads.current.parameters()), "role": "head"}]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self.local_cross_entropy(self.features(x), y)
