"""The ops of a model, as names: what is collected, scored and written down. No torch needed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

STATES = ("q", "k", "v")
"""Types of ops that are no layers: queries, keys and values of attention, see `pytest_qsens.graph.attention`."""

CACHED = ("k", "v")
"""Those of them that a cache stores."""

PRODUCTS = ("qk", "pv", "matmul")
"""Types of ops that are products of two activations, see `pytest_qsens.graph.products`: attention's two, and others."""

WEIGHTLESS = (*STATES, *PRODUCTS)
"""Types of ops that are no layers."""

TOTAL = "total"
"""Name of the whole-model item: everything the scheme can quantize, quantized at once."""

_BLOCK = re.compile(r"(.*?\.\d+)(?:[.:]|$)")


@dataclass(frozen=True)
class Op:
    """One quantizable call site, or a group of some that are measured as one.

    ``name`` is the fully qualified name of the module that owns it; functional ops append their kind
    (``layers.0.self_attn:qk``). ``type`` is ``linear``, ``conv1d``, ``conv2d``, ``conv3d``, ``embedding``, one of
    `WEIGHTLESS`, or the kind of a functional op.
    """

    name: str
    type: str
    members: tuple[Op, ...] = ()
    """Of a group, at least two ops that are flipped together, and scored as one (`pytest_qsens.groups`)."""
    elements: int | None = field(default=None, compare=False)
    """Values of its weight, where that is known; of a group ask `weights`."""
    features: int | None = field(default=None, compare=False)
    """Of the input of a linear layer, where that is known."""

    @property
    def weights(self) -> int | None:
        """Values of the weights of all its ops; ``None`` if that is not known."""
        counts = [op.elements for op in self.ops]
        return None if None in counts else sum(filter(None, counts))

    @property
    def ops(self) -> tuple[Op, ...]:
        """The ops that are flipped: the members of a group, else the op itself."""
        return self.members or (self,)

    @property
    def member_names(self) -> tuple[str, ...]:
        """Names of the members of a group; empty for an op."""
        return tuple(member.name for member in self.members)

    @property
    def block(self) -> str:
        """The repeated unit the op belongs to: its name up to the first index, else its parent module.

        A group belongs to the block of its members; one that spans several is a block of its own.

        >>> Op("encoder.layer.3.output.dense", "linear").block
        'encoder.layer.3'
        >>> Op("pooler.dense", "linear").block
        'pooler'
        """
        if self.members:
            return self.name if self.spans_blocks else self.members[0].block
        return numbered_block(self.name) or self.name.rpartition(".")[0]

    @property
    def spans_blocks(self) -> bool:
        """Whether it is a group with members in several blocks."""
        return len({member.block for member in self.members}) > 1

    def plain(self) -> list[Any]:
        """Take it apart into builtin values."""
        return [self.name, self.type, [member.plain() for member in self.members], self.elements, self.features]

    @classmethod
    def from_plain(cls, values: list[Any]) -> Op:
        """Rebuild what `plain` took apart."""
        name, kind, members, elements, features = values
        return cls(name, kind, tuple(map(cls.from_plain, members)), elements, features)

    def __str__(self) -> str:
        return self.name


def layers(ops: Iterable[Op]) -> tuple[Op, ...]:
    """Return those that are layers, and not of `WEIGHTLESS`."""
    return tuple(op for op in ops if op.type not in WEIGHTLESS)


def numbered_block(name: str) -> str | None:
    """Return the name up to the first index: that of an encoder's or decoder's block; ``None`` if there is no index."""
    match = _BLOCK.match(name)
    return match.group(1) if match else None


def matches(name: str, glob: str) -> bool:
    """Whether a glob means this op. A name means itself, whatever characters are in it.

    >>> matches("layers.0.q", "layers.*"), matches("a[0]", "a[0]"), matches("a0", "a[0]")
    (True, True, True)
    """
    return name == glob or fnmatchcase(name, glob)
