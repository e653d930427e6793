"""What a run of Intel Neural Compressor is given: ``PostTrainingQuantConfig``, ``op_name_dict``, ``op_type_dict``."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pytest_qsens.configs.documents import as_text
from pytest_qsens.configs.fields import ConfigFields
from pytest_qsens.configs.neural_compressor_smoothing import SHARING
from pytest_qsens.configs.neural_compressor_terms import (
    FORMAT,
    UNQUANTIZED,
    WRAPPED,
    approach_of,
    of_op,
    properties,
    read_recipes,
)
from pytest_qsens.configs.rules import CLASS_OF, Config, Decision, Pattern, Problem, Rule, regex

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pytest_qsens.configs.documents import Document
    from pytest_qsens.configs.neural_compressor_smoothing import Smoothed
    from pytest_qsens.module_tree import ModuleTree
    from pytest_qsens.ops import Op


@dataclass(frozen=True)
class _Settings:
    """What one entry says about an op: property → possible values, in this order of preference."""

    rule: Rule
    weight: Mapping[str, list[str]]
    activation: Mapping[str, list[str]]


@dataclass(frozen=True)
class PostTraining(Config):
    """Entries in the order in which Neural Compressor merges them, on top of what it does by default."""

    settings: tuple[_Settings, ...] = ()
    approach: str = "static"
    smoothed: Smoothed | None = None

    def of_model(self, ops: Sequence[Op], tree: Callable[[], ModuleTree] | None) -> PostTraining:  # noqa: ARG002 - for others
        """Find layers that are given no strength."""
        if self.smoothed is None:
            return self
        missing = self.smoothed.without_strength((op.name, self.decide(op).scheme) for op in ops)
        return replace(self, problems=(*self.problems, *missing))

    def decide(self, op: Op) -> Decision:
        """Follow ``TuningSpace._merge_op_cfg``, which takes activations before weights.

        What is said without a precision (fp32, bf16) quantizes an op again that an earlier word took out, and with all
        choices there are. Of the choices named, Neural Compressor takes that which comes first in its own list; those
        that it has not are left out without a word.
        """
        default = Rule(Pattern("any", ""), None, f"default of approach {self.approach}", self.path, expected=False)
        found = [entry for entry in self.settings if entry.rule.pattern.matches(op)]
        matching = (*(entry.rule for entry in reversed(found)), default)
        choices = _choices(op, self.approach)
        if not choices:
            return Decision(op, None, default, matching)
        left: dict[str, dict[str, list[str]]] | None = copy.deepcopy(choices)
        deciding = default
        for entry in found:
            for part, given in (("activation", entry.activation), ("weight", entry.weight)):
                if given:
                    left = _merged(left, choices, part, given, self.approach)
                    deciding = entry.rule
        if left is None:
            return Decision(op, None, deciding, matching)
        firsts = [{key: of[0] for key, of in left[part].items()} for part in ("weight", "activation")]
        scheme = of_op(op, firsts[0], firsts[1], self.approach)
        return Decision(op, scheme if self.smoothed is None else self.smoothed.of(op, scheme), deciding, matching)


def _merged(
    left: dict[str, dict[str, list[str]]] | None,
    choices: dict[str, dict[str, list[str]]],
    part: str,
    given: Mapping[str, list[str]],
    approach: str,
) -> dict[str, dict[str, list[str]]] | None:
    """Choices that are left after a word about one part of an op; ``None``: it is not quantized."""
    if set(given.get("dtype", ())) & set(UNQUANTIZED):
        return None
    left = copy.deepcopy(choices) if left is None else left
    for key, values in given.items():
        both = [choice for choice in choices[part].get(key, ()) if choice in values]
        if approach == "weight_only":  # its lists are longer than those here
            left[part][key] = both or values[:1]
        elif both and key != "dtype":
            left[part][key] = both
    return left


def _choices(op: Op, approach: str) -> dict[str, dict[str, list[str]]]:
    """List what the PyTorch FX adaptor can do to an op, the default first (adaptor/pytorch_cpu.yaml)."""
    if op.type not in CLASS_OF or (approach == "dynamic" and op.type.startswith("conv")):
        return {}
    if approach == "weight_only":
        weight = {"dtype": ["int"], "bits": ["4"], "group_size": ["32"], "scheme": ["sym", "asym"]}
        return {"weight": weight, "activation": {"dtype": ["fp32"]}} if op.type == "linear" else {}
    if op.type == "embedding":
        weight = {"dtype": ["uint8"], "scheme": ["asym_float"], "granularity": ["per_channel"]}
        return {"weight": weight, "activation": {"dtype": ["fp32"]}}
    schemes = ["asym", "sym"] if approach == "static" else ["asym"]
    return {
        "weight": {"dtype": ["int8"], "scheme": ["sym"], "granularity": ["per_channel"]},
        "activation": {
            "dtype": ["uint8"],
            "scheme": schemes,
            "granularity": ["per_tensor"],
            "algorithm": ["kl", "minmax"] if approach == "static" else ["minmax"],
        },
    }


_ANYWHERE = {
    "weight": {"dtype": ("int8", "uint8"), "scheme": ("sym", "asym_float"), "granularity": ("per_channel",)},
    "activation": {"dtype": ("int8", "uint8"), "scheme": ("asym", "sym"), "granularity": ("per_tensor",)},
}
"""Choices that some op has, of static and dynamic approaches."""


def read_given(document: Document) -> Config:
    """Read arguments of ``PostTrainingQuantConfig``.

    Raises:
        QsensError: If a value is of a wrong type, or is none that Neural Compressor has.

    """
    problems: list[Problem] = []
    fields = ConfigFields(document.value, str(document.path), problems)
    approach = approach_of(fields, "static")
    if approach == "auto":
        fields.problems.append(
            Problem(
                str(document.path), "approach 'auto' chooses between static and dynamic as it tunes; static is taken"
            )
        )
        approach = "static"
    fields.skip("device", "backend", "domain", "model_name", "inputs", "outputs", "example_inputs", "quant_format")
    fields.skip("calibration_sampling_size", "accuracy_criterion", "tuning_criterion", "ni_workload_name")
    smoothed = read_recipes(fields, "recipes", approach)
    fields.changes_numbers("reduce_range", "activations use 7 of 8 bits", False)
    fields.changes_numbers("quant_level", "levels below 1 tune what is quantized", 1, "auto")
    fields.changes_numbers("excluded_precisions", "ops get other precisions", [], ["bf16"])
    settings = [
        _entry(
            ConfigFields(entry, where, problems), Pattern("class_regex", regex(key, where)), f"op_type {key}", approach
        )
        for key, entry, where in fields.table("op_type_dict")
    ]
    for key, entry, where in fields.table("op_name_dict"):
        # its name for a layer that it traces alone ends with .module, and for others does not
        pattern = Pattern("regex", regex(key, where), ("", WRAPPED))
        settings.append(_entry(ConfigFields(entry, where, problems), pattern, f"op_name {key}", approach))
        if re.escape(key).replace(r"\.", ".") == key and not key.endswith(WRAPPED):
            problems.append(
                Problem(
                    where,
                    f"{key!r} is no match where Neural Compressor traces the layer alone and calls it "
                    f"'{key}{WRAPPED}': it then quantizes it without a word. Write '{key}({WRAPPED})?' to be safe",
                )
            )
    fields.finish()
    rules = tuple(entry.rule for entry in settings)
    about = "PostTrainingQuantConfig of Neural Compressor" + (f"; {SHARING}" if smoothed is not None else "")
    return PostTraining(str(document.path), FORMAT, about, rules, tuple(problems), tuple(settings), approach, smoothed)


def _entry(fields: ConfigFields, pattern: Pattern, label: str, approach: str) -> _Settings:
    parts: dict[str, dict[str, list[str]]] = {}
    for part, anywhere in _ANYWHERE.items():
        inner = fields.inner(part)
        parts[part] = {} if inner is None else properties(inner, part, approach)
        if inner is None or approach == "weight_only":
            continue
        for key, known in anywhere.items():
            without = [value for value in parts[part].get(key, ()) if value not in (*known, *UNQUANTIZED)]
            if without:
                inner.problem(key, f"{as_text(without)}: Neural Compressor has no such choice here and leaves it out")
    fields.finish()
    rule = Rule(pattern, None, label, fields.where, partial=True)
    return _Settings(rule, parts["weight"], parts["activation"])
