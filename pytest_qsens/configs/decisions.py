"""What a config says about the ops of a model, and what is wrong with it for this model."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from pytest_qsens.configs.rules import Problem
from pytest_qsens.configs.simulated import simulated_as
from pytest_qsens.op_names import match
from pytest_qsens.ops import WEIGHTLESS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from pytest_qsens.configs.rules import Config, Decision, Rule
    from pytest_qsens.module_tree import ModuleTree
    from pytest_qsens.ops import Op
    from pytest_qsens.quant.op_scheme import OpScheme, Unknown
    from pytest_qsens.quant.schemes import Scheme


def decide(
    config: Config, ops: Sequence[Op], tree: Callable[[], ModuleTree] | None = None
) -> tuple[list[Decision], list[Problem]]:
    """Tell op by op how a config quantizes a model.

    Args:
        config: What was read.
        ops: Of the model.
        tree: Lists the model's modules, where it is known.

    Returns:
        One decision for each op, in their order; and what is wrong: with the file, with rules that match no op, decide
        none or contradict each other, with schemes that cannot be simulated.

    """
    config = config.of_model(ops, tree)
    decisions = [config.decide(op) for op in ops]
    problems = [
        *config.problems,
        *_unmatched(config, decisions, ops),
        *_shadowed(config, decisions),
        *_rivals(decisions),
        *_unsimulated(decisions),
    ]
    return decisions, problems


def told(decisions: Iterable[Decision], down: Scheme | None = None) -> list[Decision]:
    """Leave out what has no weights and a config says nothing of: without it these are no ops of the model.

    Args:
        decisions: Of a config.
        down: Scheme of what it leaves unquantized.

    """
    return [
        decision
        for decision in decisions
        if decision.op.type not in WEIGHTLESS
        or decision.scheme is not None
        or (down is not None and down.means(decision.op.type))
    ]


def scheme_name(scheme: OpScheme | Unknown | None) -> str:
    """How a scheme is called in tables."""
    return "unquantized" if scheme is None else scheme.name


def _unmatched(config: Config, decisions: Sequence[Decision], ops: Sequence[Op]) -> list[Problem]:
    matched = {rule.where for decision in decisions for rule in decision.matching}
    missing = {rule.where: rule for rule in config.rules if rule.expected and rule.where not in matched}
    names = [op.name for op in ops]
    exact = [rule.pattern.text for rule in missing.values() if rule.pattern.kind == "name"]
    found = match(exact, names)
    likely = dict(found.pairs) if found.prefix is not None else {}
    return [Problem(rule.where, _no_op(rule, likely.get(rule.pattern.text))) for rule in missing.values()]


def _no_op(rule: Rule, likely: str | None) -> str:
    hint = f"Is {likely!r} meant?" if likely is not None else "Correct it, or take it out."
    return f"{rule.label!r} matches no op of the model. {hint}"


def _shadowed(config: Config, decisions: Sequence[Decision]) -> Iterator[Problem]:
    """Find rules that match ops, say something else of them than what holds, and hold for none.

    A rule for all that others leave is none of them, nor one of which the tool takes a part, or which rivals another.
    """
    holding = {decision.rule.where for decision in decisions if decision.rule is not None}
    rivals = {rule.where for decision in decisions for rule in decision.rivals}
    told = holding | rivals
    for rule in config.rules:
        if rule.where in told or rule.partial or not rule.expected or rule.pattern.is_rest:
            continue
        ops = [decision for decision in decisions if any(other.where == rule.where for other in decision.matching)]
        others = [decision for decision in ops if rule in decision.matching and decision.scheme != rule.scheme]
        if others and (first := others[0].rule) is not None:
            told.add(rule.where)
            names = tuple(decision.op.name for decision in ops)
            yield Problem(
                rule.where,
                f"{rule.label!r} ({scheme_name(rule.scheme)}) holds for no op: {_count(names)} matched by it, and "
                f"decided by rules that go before it, {first.label!r} ({scheme_name(first.scheme)}) for one. Put it "
                "before them, or take it out",
                names,
            )


def _rivals(decisions: Sequence[Decision]) -> list[Problem]:
    ops: defaultdict[tuple[str, tuple[str, ...]], list[Decision]] = defaultdict(list)
    for decision in decisions:
        if decision.rule is not None and decision.rivals:
            ops[decision.rule.where, tuple(rival.where for rival in decision.rivals)].append(decision)
    problems = []
    for group in ops.values():
        first = group[0]
        assert first.rule is not None  # noqa: S101  # for mypy: kept above
        taken, *others = (f"{rule.label!r} ({scheme_name(rule.scheme)})" for rule in (first.rule, *first.rivals))
        names = tuple(decision.op.name for decision in group)
        problems.append(
            Problem(
                first.rule.where,
                f"{_count(names)} matched by {taken}, which holds here, and by {' and '.join(others)}: the tool does "
                "not say which of them holds. Make them exclude each other",
                names,
            )
        )
    return problems


def _unsimulated(decisions: Sequence[Decision]) -> list[Problem]:
    ops: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    for decision in decisions:
        if decision.scheme is not None:
            name, reason = simulated_as(decision.scheme, decision.op)
            if name is None:
                where = decision.rule.where if decision.rule is not None else ""
                ops[where, scheme_name(decision.scheme), reason].append(decision.op.name)
    return [
        Problem(where, f"{_count(names)} quantized as {scheme!r}, which cannot be simulated: {reason}", tuple(names))
        for (where, scheme, reason), names in ops.items()
    ]


def _count(names: Sequence[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{len(names)} ops ({names[0]}, ...) are"
