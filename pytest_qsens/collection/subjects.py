"""What a test measures, and what that belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pytest_qsens.ops import Op


class Subject(NamedTuple):
    """What has a snapshot, a section of the summary and a result file of its own."""

    model: str
    scheme: str
    """Or the name of a config."""
    granularity: str = "op"


@dataclass(frozen=True)
class Case:
    """What one test measures: an op of a model under a scheme, a group of ops, or the whole model (`TOTAL`)."""

    model: str
    scheme: str
    op: str
    granularity: str = "op"
    members: tuple[str, ...] = ()
    """Of a group."""

    @property
    def subject(self) -> Subject:
        """Where its result belongs."""
        return Subject(self.model, self.scheme, self.granularity)

    @property
    def unit(self) -> Op:
        """The op or group, without types."""
        return Op(self.op, "", tuple(Op(member, "") for member in self.members))
