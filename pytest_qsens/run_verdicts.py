"""What gates of a whole run find, which are judged when all ops are through. Knows nothing of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pytest_qsens.joint_gates import JointGate
    from pytest_qsens.rank_gates import RankGate

State = Literal["held", "failed", "not judged", "accepted"]
"""What became of a gate; ``accepted``: it failed, and the snapshot takes the new order of the ops."""


@dataclass(frozen=True)
class RunVerdict:
    """What a gate found.

    Attributes:
        gate: What was to hold.
        state: Whether it did.
        text: What was found, or why the gate could not be judged.
        by: Mode and metric that ops were ranked by, such as ``isolated nmse``; nothing for a gate that names its own.

    """

    gate: RankGate | JointGate
    state: State
    text: str
    by: str = ""

    def __str__(self) -> str:
        """Give one line, without the model."""
        return f"{self.gate} {self.state}{f', {self.by}' * bool(self.by)}: {self.text}"
