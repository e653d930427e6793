"""Ops that are measured as one, found by their names: the op list of a model is known before any weight is loaded."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from pytest_qsens.errors import QsensError
from pytest_qsens.ops import Op, numbered_block

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Key = str | tuple["Fused", tuple[str, ...]]
    """What the ops of a group have in common: the group's name, or a pattern and the parts of names that it fixes."""

GRANULARITIES = ("op", "fused", "block", "type")

_INDEX = re.compile(r"(^|\.)\d+(?=\.)")
"""A layer's index: something follows it. The last part of a name says which of its kind an op is, even as a number."""

_BRACES = re.compile(r"\{([^{}]*)\}")
_ANY = "*"

FUSED = (
    # cross-attention: the query reads the decoder's values, keys and values read the encoder's
    "*.encoder_attn.{k_proj,v_proj}",
    "*.EncDecAttention.{k,v}",
    "*.crossattention.self.{key,value}",
    "*.crossattention.attention.{key,value}",
    "*.cross_attn.{k_proj,v_proj}",
    "*.attn2.{to_k,to_v}",
    # self-attention
    "*.{q_proj,k_proj,v_proj}",
    "*.{query,key,value}",
    "*.{query_proj,key_proj,value_proj}",
    "*.{q,k,v}",
    "*.{to_q,to_k,to_v}",
    "*.{wq,wk,wv}",
    "*.{q_lin,k_lin,v_lin}",
    "*.{q_a_proj,kv_a_proj_with_mqa}",
    # experts of one layer: first what reads the same rows, then every other role for itself
    "*.experts.{*}.{gate_proj,up_proj}",
    "*.experts.{*}.{w1,w3}",
    "*.experts.{*}.*",
    # gated feed-forward layers
    "*.{gate_proj,up_proj}",
    "*.{w1,w3}",
    "*.{wi_0,wi_1}",
)
"""Patterns of ops that read the same values and that inference engines run as one product; see `Fused`."""


@dataclass(frozen=True)
class Fused:
    """A pattern of names, as ``*.self_attn.{q_proj,k_proj,v_proj}``.

    Ops that it matches, and that differ in nothing but what the braces stand for, are a group. ``{*}`` stands for any
    one part of a name, such as the number of an expert; outside of braces ``*`` and ``?`` are as in globs, and ``*.``
    at the start stands for no module, too.
    """

    text: str

    @classmethod
    def parse(cls, text: str, where: str) -> Fused:
        """Read a pattern.

        Raises:
            QsensError: If it has no braces, or some that are empty, nested or not closed; names ``where``.

        """
        choices = _BRACES.findall(text)
        bare = _BRACES.sub("", text)
        if not choices or "{" in bare or "}" in bare or not all(all(map(str.strip, c.split(","))) for c in choices):
            raise QsensError(
                f"{where} {text!r} is no pattern of ops to be measured as one: put what differs between them in "
                "braces, such as '*.self_attn.{q_proj,k_proj,v_proj}' or '*.experts.{*}.down_proj'"
            )
        return cls(text)

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        """What is fixed is in the groups of even numbers from 0 on, what the braces stand for in the others."""
        found = []
        for i, piece in enumerate(_BRACES.split(self.text)):
            if i % 2:
                choices = [choice.strip() for choice in piece.split(",")]
                found.append("|".join(r"[^.]+" if choice == _ANY else re.escape(choice) for choice in choices))
            else:
                anywhere = i == 0 and piece.startswith("*.")
                rest = piece[2:] if anywhere else piece
                glob = "".join({"*": ".*", "?": "."}.get(character) or re.escape(character) for character in rest)
                found.append(rf"(?:.*\.)?{glob}" if anywhere else glob)
        return re.compile("".join(f"({piece})" for piece in found))

    def parts(self, name: str) -> tuple[str, ...] | None:
        """Take the name of an op apart: fixed parts, and between them what the braces stand for."""
        match = self._regex.fullmatch(name)
        return None if match is None else match.groups()

    def name(self, taken: Sequence[tuple[str, ...]]) -> str:
        """Name a group, from the parts of its members' names in model order.

        >>> Fused("{*}.{q,k}").name([("", "0", ".", "q", ""), ("", "1", ".", "q", ""), ("", "1", ".", "k", "")])
        '*.q+k'
        """
        pieces = list(taken[0])
        for i, choices in enumerate(_BRACES.findall(self.text)):
            found = dict.fromkeys(parts[2 * i + 1] for parts in taken)
            pieces[2 * i + 1] = _ANY if _ANY in choices.split(",") and len(found) > 1 else "+".join(found)
        return "".join(pieces)


def grouped(ops: Sequence[Op], granularity: str, fused: Sequence[Fused] = ()) -> tuple[Op, ...]:
    """Group the ops of a model, in the order of the first member of each; an op with no other in its group stays.

    Args:
        ops: All ops of the model.
        granularity: One of `GRANULARITIES`. ``block``: those of one numbered block; ``type``: those whose names differ
            in the indices of layers alone; ``fused``: by patterns; ``op``: none.
        fused: Patterns that go before `FUSED`: the first one that matches an op decides.

    Raises:
        QsensError: If two groups, or a group and an op, would have the same name.

    """
    if granularity == "op":
        return tuple(ops)
    find: dict[str, Callable[[str], Key | None]] = {
        "block": numbered_block,
        "type": _type,
        "fused": _by_pattern((*fused, *map(Fused, FUSED))),
    }
    groups: dict[tuple[Key, bool], list[Op]] = {}
    for op in ops:
        key = find[granularity](op.name)
        groups.setdefault((op.name, False) if key is None else (key, True), []).append(op)
    units = tuple(_group(key, members) for (key, _), members in groups.items())
    names = Counter(unit.name for unit in units)
    for unit in units:
        if names[unit.name] > 1:
            raise QsensError(
                f"--qsens-granularity {granularity}: the group of {', '.join(unit.member_names[:3]) or unit.name}, ... "
                f"would be called {unit.name!r}, which is the name of something else. Measure with another granularity"
            )
    return units


def _type(name: str) -> str:
    """Replace the indices of layers.

    >>> _type("model.layers.3.mlp.experts.0.w1"), _type("merger.mlp.0"), _type("0.fc")
    ('model.layers.*.mlp.experts.*.w1', 'merger.mlp.0', '*.fc')
    """
    return _INDEX.sub(r"\1*", name)


def _by_pattern(patterns: Sequence[Fused]) -> Callable[[str], Key | None]:
    def find(name: str) -> Key | None:
        for pattern in patterns:
            parts = pattern.parts(name)
            if parts is not None:
                return pattern, parts[::2]
        return None

    return find


def _group(key: Key, members: Sequence[Op]) -> Op:
    if len(members) == 1:
        return members[0]
    if isinstance(key, str):
        name = key
    else:
        pattern, _ = key
        name = pattern.name([parts for member in members if (parts := pattern.parts(member.name))])
    return Op(name, "+".join(sorted({member.type for member in members})), tuple(members))
