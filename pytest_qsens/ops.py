"""The ops of a model, as names: what is collected, scored and written down. No torch needed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

TOTAL = "total"
"""Name of the whole-model item: everything the scheme can quantize, quantized at once."""

_BLOCK = re.compile(r"(.*?\.\d+)(?:[.:]|$)")


@dataclass(frozen=True)
class Op:
    """One quantizable call site.

    ``name`` is the fully qualified name of the module that owns it; functional ops append their kind
    (``layers.0.self_attn:qk``). ``type`` is ``linear``, ``conv1d``, ``conv2d``, ``conv3d``, ``embedding`` or the
    kind of a functional op.
    """

    name: str
    type: str

    @property
    def block(self) -> str:
        """The repeated unit the op belongs to: its name up to the first index, else its parent module.

        >>> Op("encoder.layer.3.output.dense", "linear").block
        'encoder.layer.3'
        >>> Op("pooler.dense", "linear").block
        'pooler'
        """
        match = _BLOCK.match(self.name)
        return match.group(1) if match else self.name.rpartition(".")[0]

    def __str__(self) -> str:
        return self.name


def matches(name: str, glob: str) -> bool:
    """Whether a glob means this op. A name means itself, whatever characters are in it.

    >>> matches("layers.0.q", "layers.*"), matches("a[0]", "a[0]"), matches("a0", "a[0]")
    (True, True, True)
    """
    return name == glob or fnmatchcase(name, glob)
