"""llm-compressor: which layers ``SmoothQuantModifier`` smooths, and how.

Semantics are those of llmcompressor 0.14 (``modifiers/transform/smoothquant/base.py``) and of ``match_modules_set`` of
compressed-tensors 0.20: modules are taken in the order of the model, and a set of layers to be balanced and of one to
be smoothed ends where the next match lies outside of what the set has in common.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_qsens.configs.documents import as_text
from pytest_qsens.configs.llm_compressor_mappings import Mapping, mappings_of
from pytest_qsens.configs.rules import CLASS_OF, Problem, regex
from pytest_qsens.errors import QsensError
from pytest_qsens.files import typed
from pytest_qsens.groups import grouped
from pytest_qsens.ops import Op
from pytest_qsens.quant.op_scheme import SmoothQuant
from pytest_qsens.wording import first_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_qsens.configs.fields import ConfigFields
    from pytest_qsens.module_tree import ModuleTree

NAME = "SmoothQuantModifier"
_REGEX = "re:"
_NUMBERS = re.compile(r"(?:^|(?<=\.))\d+(?=\.)")
_LAYERS = frozenset(CLASS_OF.values())


@dataclass(frozen=True)
class Smoother:
    """One modifier: its scales, its mappings (``None``: those of the architecture), and what it leaves out."""

    smoothing: SmoothQuant
    mappings: tuple[Mapping, ...] | None
    ignore: tuple[str, ...]
    where: str


def read_smoother(fields: ConfigFields) -> Smoother | None:
    """Read a modifier; ``None`` if it smooths in a way that is not simulated, which is told.

    Raises:
        QsensError: If a value is of a wrong type, or llm-compressor would not take it.

    """
    alpha = fields.optional_number("smoothing_strength")
    alpha = SmoothQuant.alpha if alpha is None else alpha
    if not 0 <= alpha <= 1:
        raise QsensError(f"{fields.at('smoothing_strength')}: {alpha:g} is not possible, a number from 0 to 1 is")
    algorithm = fields.known("algorithm", ("smoothquant", "log_equalization"), "smoothquant")
    if algorithm != "smoothquant":
        fields.problem("algorithm", f"{algorithm!r} changes numbers and is not simulated: 'smoothquant' is")
    mappings = _mappings(fields)
    ignore = tuple(text for text, _ in fields.texts_of("ignore"))
    fields.skip("num_calibration_steps", "calibration_function", "requires_calibration_data")
    fields.skip("group", "index", "start", "end", "update", "initialized_", "finalized_", "started_", "ended_")
    fields.finish()
    for text in ignore:
        _check(text, fields.at("ignore"))
    smoothing = SmoothQuant(alpha, statistic="range")
    return None if algorithm != "smoothquant" else Smoother(smoothing, mappings, ignore, fields.where)


def _mappings(fields: ConfigFields) -> tuple[Mapping, ...] | None:
    value, where = fields.take("mappings"), fields.at("mappings")
    if value is None:
        return None
    found = []
    for number, entry in enumerate(typed(value, list, where), 1):
        place = f"{where}, entry {number}"
        targets = [*_leaves(entry)]
        if len(targets) < 2 or not all(isinstance(target, str) for target in targets):
            raise QsensError(
                f"{place}: [[layers that are smoothed, ...], the layer before them] is needed, found {as_text(entry)}"
            )
        for target in targets:
            _check(str(target), place)
        *balance, smooth = map(str, targets)
        found.append(Mapping(tuple(balance), smooth))
    return tuple(found)


def _leaves(value: object) -> Iterator[object]:
    if isinstance(value, list | tuple):
        for entry in value:
            yield from _leaves(entry)
    else:
        yield value


def _check(target: str, where: str) -> None:
    if target.startswith(_REGEX):
        regex(target.removeprefix(_REGEX), where)


def smoothed_by_name(smoothers: Sequence[Smoother], ops: Sequence[Op]) -> tuple[dict[str, SmoothQuant], list[Problem]]:
    """Tell which ops are smoothed where only these are known: by their names, if the mappings are given.

    Returns:
        Name of an op → its scales; and what cannot be told.

    """
    found: dict[str, SmoothQuant] = {}
    problems = []
    for smoother in smoothers:
        if smoother.mappings is None:
            problems.append(
                Problem(
                    smoother.where,
                    f"{NAME} has no mappings, which depend on the class of the model, so it is left out. Give the "
                    "model (--model), or write the mappings",
                )
            )
        targets = [target for mapping in smoother.mappings or () for target in mapping.balance]
        for op in ops:
            if op.type == "linear" and any(_means(target, op.name, ("Linear",)) for target in targets):
                found.setdefault(op.name, smoother.smoothing)
    return found, problems


def smoothed_in(smoothers: Sequence[Smoother], tree: ModuleTree) -> tuple[dict[str, SmoothQuant], list[Problem]]:
    """Tell which layers of a model are smoothed.

    Returns:
        Name of a layer → its scales; and what is wrong: a mapping that llm-compressor cannot apply, that means nothing
        here, or that smooths in a way that is not simulated.

    """
    found: dict[str, SmoothQuant] = {}
    problems: list[Problem] = []
    for smoother in smoothers:
        mappings = mappings_of(tree) if smoother.mappings is None else smoother.mappings
        sets: list[tuple[str, list[str]]] = []
        for mapping in mappings:
            try:
                own = [*sets_of(mapping, smoother.ignore, tree)]
            except Inapplicable as error:
                what = f"{as_text(_plain(mapping))} cannot be applied by llm-compressor to {tree.architecture}: {error}"
                problems.append(Problem(smoother.where, what))
                continue
            if not own and smoother.mappings is not None:
                problems.append(
                    Problem(smoother.where, f"{as_text(_plain(mapping))} smooths no layer. Correct it, or take it out")
                )
            sets += own
        if not sets and smoother.mappings is None and mappings:
            problems.append(
                Problem(
                    smoother.where,
                    f"{NAME} smooths no layer of {tree.architecture}: what it smooths by default is "
                    f"{as_text([_plain(mapping) for mapping in mappings])}. Write its mappings, or take it out",
                )
            )
        _take(smoother, sets, dict(tree.modules), found, problems)
    if smoothers:
        problems += _left_out(found, tree, smoothers[0].where)
    return found, problems


def _left_out(found: dict[str, SmoothQuant], tree: ModuleTree, where: str) -> Iterator[Problem]:
    """Find layers that are not smoothed and by their names read what others read that are, such as a query's key."""
    linear = [Op(name, "linear") for name, classes in tree.modules if "Linear" in classes]
    for group in grouped(linear, "fused"):
        others = [name for name in group.member_names if name not in found]
        if others and len(others) < len(group.member_names):
            smoothed = next(name for name in group.member_names if name in found)
            what = (
                f"{others[0]} reads what {smoothed} reads, and no mapping has it: llm-compressor changes what it "
                "computes, which is not simulated. Add it to the mapping"
            )
            yield Problem(where, what, tuple(others))


def _take(
    smoother: Smoother,
    sets: Sequence[tuple[str, list[str]]],
    classes: dict[str, tuple[str, ...]],
    found: dict[str, SmoothQuant],
    problems: list[Problem],
) -> None:
    """Note the layers of sets that are simulated, and tell the others, of one kind together."""
    untold: dict[str, list[str]] = {}
    for smooth, balance in sets:
        own = _LAYERS.intersection(classes[smooth])
        several = len({_NUMBERS.sub("", name) for name in balance}) < len(balance)
        others = [name for name in balance if not {"Linear", "Conv1D"}.intersection(classes[name])]
        again = [name for name in balance if name in found]
        if own:
            why = f"the layer before them is a {min(own)}, whose own weight takes the scales up and is rounded, too"
        elif several:
            why = "layers of several numbers, such as experts, have one scale there, and each its own here"
        elif others:
            why = f"{others[0]} is no linear layer"
        elif again:
            why = "they are smoothed twice"
        else:
            found.update(dict.fromkeys(balance, smoother.smoothing))
            continue
        untold.setdefault(why, []).extend(balance)
    for why, names in untold.items():
        what = f"{first_of(names, 2)}: smoothed in a way that is not simulated, so it is left out: {why}"
        problems.append(Problem(smoother.where, what, tuple(names)))


class Inapplicable(Exception):  # noqa: N818 - it becomes a problem
    """llm-compressor fails on a mapping."""


def sets_of(mapping: Mapping, ignore: Sequence[str], tree: ModuleTree) -> Iterator[tuple[str, list[str]]]:
    """Find the layer before, and the layers that are smoothed, of each place where a mapping applies.

    Raises:
        Inapplicable: If llm-compressor fails.

    """
    ignored = {name for name, classes in tree.modules if any(_means(target, name, classes) for target in ignore)}
    for *balanced, smooth in _matched([*mapping.balance, mapping.smooth], tree):
        if len(smooth) > 1:
            raise Inapplicable(
                f"{smooth[0]} and {smooth[1]} are both a layer before {balanced[0][0]} by what they have in common"
            )
        balance = [name for names in balanced for name in names]
        if not ignored.issuperset([*smooth, *balance]):  # it looks for one that is not ignored
            yield smooth[0], balance


def _matched(targets: Sequence[str], tree: ModuleTree) -> Iterator[list[list[str]]]:
    """Follow ``match_modules_set``: names of each target, set by set.

    Raises:
        Inapplicable: If a module is matched twice, or the last set is not complete.

    """
    matches: dict[str, list[str]] = {target: [] for target in targets}
    common: str | None = None
    for name, classes in tree.modules:
        hits = [target for target in matches if _means(target, name, classes)]
        for target in hits:
            wider = _in_common(name, common)
            if all(matches.values()) and wider != common:
                yield [matches[of] for of in targets]
                matches = {of: [] for of in targets}
                wider = name
            matches[target].append(name)
            common = wider
        if len(hits) > 1:
            raise Inapplicable(f"{name} is matched by {' and '.join(hits)}")
    if all(matches.values()):
        yield [matches[of] for of in targets]
    elif any(matches.values()):
        missing = next(target for target, names in matches.items() if not names)
        first = next(names[0] for names in matches.values() if names)
        raise Inapplicable(f"there is {first}, and nothing that {missing!r} matches with it")


def _in_common(name: str, other: str | None) -> str:
    """Follow ``get_lowest_common_ancestor_name``."""
    if other is None:
        return name
    parts = []
    for mine, theirs in zip(name.split("."), other.split("."), strict=False):
        if mine != theirs:
            break
        parts.append(mine)
    return ".".join(parts)


def _means(target: str, name: str, classes: Sequence[str]) -> bool:
    if target.startswith(_REGEX):
        return re.match(target.removeprefix(_REGEX), name) is not None
    return target == name or target in classes


def _plain(mapping: Mapping) -> list[object]:
    return [list(mapping.balance), mapping.smooth]
