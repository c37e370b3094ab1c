"""Codebases that are known and not supported: recognised, so that the error can say why."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, NoReturn

from torch import Tensor, nn

from variant_kernels.integrations.base import Family, PatchError, Swap


class RefusedFamily(Family):
    """A family whose every model is refused.

    reason: what its error says.
    """

    reason: ClassVar[str]

    @abstractmethod
    def recognise(self, model: nn.Module) -> bool:
        """See :class:`Family`."""

    def verify(self, model: nn.Module) -> None:
        """Raises: PatchError, always."""
        self._refuse()

    def runtime(self, model: nn.Module) -> Any:
        """Raises: PatchError, always."""
        self._refuse()

    def swaps(self, model: nn.Module, runtime: Any) -> list[Swap]:
        """Raises: PatchError, always."""
        self._refuse()

    def probe(self, model: nn.Module) -> list[Tensor]:
        """Raises: PatchError, always."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise PatchError(
            f"patch: the model looks like {self.name}, which is not supported: {self.reason}"
        )


def first_block(model: nn.Module) -> Any:
    """The first of ``model.blocks``, or None."""
    blocks = getattr(model, "blocks", None)
    return blocks[0] if isinstance(blocks, nn.ModuleList) and len(blocks) else None
