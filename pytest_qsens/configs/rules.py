"""What a config says, whatever tool it is for: rules in order of precedence, and what is wrong with the file itself."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import TYPE_CHECKING, Literal

from pytest_qsens.errors import QsensError
from pytest_qsens.ops import WEIGHTLESS, matches
from pytest_qsens.quant.op_scheme import NotTold

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_qsens.module_tree import ModuleTree
    from pytest_qsens.ops import Op
    from pytest_qsens.quant.op_scheme import OpScheme, Unknown

CLASS_OF = {
    "linear": "Linear",
    "conv1d": "Conv1d",
    "conv2d": "Conv2d",
    "conv3d": "Conv3d",
    "embedding": "Embedding",
}
"""Name of torch's class, as tools write it, for each type of op."""


@cache
def _compiled(text: str) -> re.Pattern[str]:
    """Compile an expression once; re itself remembers 512, and a file can have one for each of a thousand ops."""
    return re.compile(text)


def _narrowly(name: str, text: str) -> bool:
    """Whether an expression matches a module from the start of its name on, and neither its parent nor a child."""
    found = _compiled(text).match
    parent = name.rpartition(".")[0]
    return found(name) is not None and found(parent) is None and found(f"{name}.k_proj") is None


_IS_MEANT: dict[str, Callable[[str, str], bool]] = {
    "name": operator.eq,
    "glob": matches,
    "wildcard": fnmatchcase,
    "regex": lambda name, text: _compiled(text).fullmatch(name) is not None,
    "regex_start": lambda name, text: _compiled(text).match(name) is not None,
    "module": operator.eq,
    "module_start": lambda name, text: _compiled(text).match(name) is not None,
    "module_narrow": lambda name, text: _compiled(text).match(name) is not None,
    "class": lambda name, text: text in (name, "Module"),
    "class_regex": lambda name, text: _compiled(text).fullmatch(name) is not None,
    "any": lambda _, __: True,
}


@dataclass(frozen=True)
class Pattern:
    """Which ops a rule means.

    ``kind`` is what ``text`` is compared with, and how: ``name``, the op's own; ``glob``, that of ``--qsens-ops``;
    ``wildcard``, one of Python's fnmatch; ``regex``, for the whole name; ``regex_start``, from its start on;
    ``module``, ``module_start`` and ``module_narrow``, that of the module whose queries, keys or values these are, the
    last if neither its parent nor a child is meant by ``text``, or else by an expression of ``beside``; ``class``, of
    the module or one above it; ``class_regex``, for the whole of that; ``any``, nothing.
    ``suffixes`` are put behind the op's name first, for tools that match the name of a part of a module. Only ops of
    ``types`` are meant; if there are none, all layers.
    """

    kind: Literal[
        "name",
        "glob",
        "wildcard",
        "regex",
        "regex_start",
        "module",
        "module_start",
        "module_narrow",
        "class",
        "class_regex",
        "any",
    ]
    text: str
    suffixes: tuple[str, ...] = ("",)
    types: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def is_rest(self) -> bool:
        """Whether it means every op, as that of a rule for what the others leave."""
        return self.kind == "any" or (self.kind in ("glob", "wildcard") and set(self.text) == {"*"})

    def matches(self, op: Op) -> bool:
        """Whether this op is meant."""
        if op.type not in self.types if self.types else op.type in WEIGHTLESS:
            return False
        is_class = self.kind.startswith("class")
        named = op.name.rpartition(":")[0] if self.kind.startswith("module") else op.name
        if self.kind == "module_narrow" and not any(_narrowly(named, text) for text in (self.text, *self.beside)):
            return False
        names = [CLASS_OF.get(op.type, "")] if is_class else [named + suffix for suffix in self.suffixes]
        return any(_IS_MEANT[self.kind](name, self.text) for name in names)


def regex(text: str, where: str) -> str:
    """Check a regular expression.

    Raises:
        QsensError: If it is none; with the place.

    """
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise QsensError(f"{where}: {text!r} is no regular expression ({error}). Correct it.") from error
    return text


@dataclass(frozen=True)
class Rule:
    """One statement of a file: these ops are quantized like that; ``None``: not at all.

    ``label`` is how the rule is called in a table, ``where`` its place in the file. ``expected``: that no op of a model
    matches is worth a word, which a tool's defaults are not. ``partial``: the tool puts an op's scheme together from
    all rules that mean it, and ``scheme`` is not the rule's own. ``rank``: the tool does not say which of two rules of
    one rank holds; ``None`` where it does.
    """

    pattern: Pattern
    scheme: OpScheme | Unknown | None
    label: str
    where: str
    expected: bool = True
    rank: int | None = None
    partial: bool = False


@dataclass(frozen=True)
class Decision:
    """What a config says about one op.

    ``rule`` decides, if there is one; ``matching`` are all rules that mean the op, ``rivals`` those of them that say
    something else and that the tool does not put behind it.
    """

    op: Op
    scheme: OpScheme | Unknown | None
    rule: Rule | None
    matching: tuple[Rule, ...] = ()
    rivals: tuple[Rule, ...] = ()


@dataclass(frozen=True)
class Problem:
    """Something about a config that would change what is measured if nobody looked.

    ``where`` is the place in the file, ``ops`` names the ops that it is about, if there are any.
    """

    where: str
    message: str
    ops: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass(frozen=True)
class Config:
    """A file that was read.

    Attributes:
        path: The file.
        format: Name of the format, as in ``--format``.
        about: One line for people: what it is.
        rules: In order of precedence: the first that matches an op decides.
        problems: What is wrong with the file itself, before any model is known.

    """

    path: str
    format: str
    about: str
    rules: tuple[Rule, ...]
    problems: tuple[Problem, ...] = ()

    @property
    def only_excludes(self) -> bool:
        """Whether it says which ops are not quantized, and nothing of how the others are."""
        return any(isinstance(rule.scheme, NotTold) for rule in self.rules)

    def of_model(self, ops: Sequence[Op], tree: Callable[[], ModuleTree] | None) -> Config:  # noqa: ARG002 - for others
        """Return what this is for a model, where its modules matter that are no ops.

        Args:
            ops: Of the model.
            tree: Lists its modules, which may take a second; ``None`` if only the ops are known.

        """
        return self

    def decide(self, op: Op) -> Decision:
        """How an op is quantized."""
        found = [rule for rule in self.rules if rule.pattern.matches(op)]
        if not found:
            return Decision(op, None, None)
        first, *rest = found
        rivals = [rule for rule in rest if rule.rank is not None and rule.rank == first.rank]
        rivals = [rule for rule in rivals if rule.scheme != first.scheme]
        return Decision(op, first.scheme, first, tuple(found), tuple(rivals))
