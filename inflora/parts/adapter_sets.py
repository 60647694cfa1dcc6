"""The frame of methods that give every task a set of adapters of its own."""

from typing import Any

from torch import nn

from inflora.method import Method
from inflora.parts import adapters


class AdapterSetMethod(Method):
    """Sets of adapters in all blocks; the newest trains as the branch. The subclass adds them, with `add_set`.

    Args:
        backbone: a timm vision transformer without head.
        bottleneck: width of an adapter.
        adapter_scale: factor of its output.
        dropout: inside an adapter.

    Raises:
        ValueError: if an argument does not fit the backbone.
    """

    def __init__(self, backbone: Any, *, bottleneck: int, adapter_scale: float, dropout: float) -> None:
        super().__init__(backbone)
        adapters.check_adapters(backbone, bottleneck=bottleneck, dropout=dropout)
        self._adapter: dict[str, Any] = {"bottleneck": bottleneck, "scale": adapter_scale, "dropout": dropout}

    @property
    def num_sets(self) -> int:
        return adapters.num_sets(self.backbone)

    def set_parameters(self, index: int) -> list[nn.Parameter]:
        """All numbers of a set, block by block."""
        return [parameter for adapter in adapters.adapter_set(self.backbone, index) for parameter in adapter.parameters()]

    def add_set(self, *, copied_from: int | None = None) -> None:
        """Add a set, fresh or as another one is, and make it the active one."""
        newest = adapters.inject(self.backbone, **self._adapter)
        if copied_from is not None:
            for new, old in zip(newest, adapters.adapter_set(self.backbone, copied_from), strict=True):
                new.load_state_dict(old.state_dict())

    def branch_and_head(self, head: nn.Module) -> list[dict[str, Any]]:
        """Optimiser groups of the newest set and of `head`."""
        return [
            {"params": self.set_parameters(self.num_sets - 1), "role": "branch"},
            {"params": list(head.parameters()), "role": "head"},
        ]

    def extra_state(self) -> dict[str, Any]:
        return {"num_sets": self.num_sets}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        adapters.remove(self.backbone)
        for _ in range(state["num_sets"]):
            self.add_set()
