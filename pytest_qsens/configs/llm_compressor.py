"""llm-compressor: ``recipe.yaml``, the modifiers that one call of ``oneshot`` applies.

Semantics are those of llmcompressor 0.14: ``recipe.Recipe.from_dict`` and ``QuantizationMixin``, which matches as
compressed-tensors does. Where several modifiers quantize, the last one that means an op holds: each one resets what it
matches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pytest_qsens.configs.compressed_tensors import Group, ordered, preset, read_group
from pytest_qsens.configs.compressed_tensors_states import attention_rules, read_cache
from pytest_qsens.configs.documents import as_text
from pytest_qsens.configs.fields import ConfigFields
from pytest_qsens.configs.llm_compressor_smoothing import NAME as SMOOTHER
from pytest_qsens.configs.llm_compressor_smoothing import read_smoother, smoothed_by_name, smoothed_in
from pytest_qsens.configs.observers import named_by_llm_compressor, observed
from pytest_qsens.configs.rules import Config, Decision, Problem, Rule
from pytest_qsens.errors import QsensError
from pytest_qsens.quant.op_scheme import OpScheme

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pytest_qsens.configs.documents import Document
    from pytest_qsens.configs.llm_compressor_smoothing import Smoother
    from pytest_qsens.module_tree import ModuleTree
    from pytest_qsens.ops import Op
    from pytest_qsens.quant.op_scheme import SmoothQuant, Unknown

NAME = "llm-compressor"
TITLE = "llm-compressor (recipe.yaml: '..._stage', '..._modifiers')"

_STAGE, _MODIFIERS = "_stage", "_modifiers"
_QUANTIZING = ("QuantizationModifier", "GPTQModifier", "AWQModifier", "AutoRoundModifier")
_ROUNDING = {
    "GPTQModifier": "weights are rounded by GPTQ, not to the nearest",
    "AWQModifier": "weights are scaled by AWQ before they are rounded",
    "AutoRoundModifier": "weights are rounded by AutoRound, not to the nearest",
}
_NO_EFFECT = (
    "bypass_divisibility_checks",
    "requires_calibration_data",
    "batched_quantization",
    "offload_device",
    "group",
    "index",
    "start",
    "end",
    "update",
    "initialized_",
    "finalized_",
    "sequential_targets",
    "sequential_update",
)
_OF_ROUNDING = ("block_size", "dampening_frac", "actorder", "duo_scaling", "n_grid", "mappings", "iters", "batch_size")


def detect(document: Document) -> bool:
    """Whether a file is of this format."""
    value = document.value
    return isinstance(value, dict) and (
        any(_is_stage(key, inside) for key, inside in value.items()) or any(_is_modifiers(key) for key in value)
    )


def _is_stage(key: object, value: object) -> bool:
    return (
        isinstance(key, str)
        and key.endswith(_STAGE)
        and isinstance(value, dict)
        and any(_is_modifiers(inner) for inner in value)
    )


def _is_modifiers(key: object) -> bool:
    return isinstance(key, str) and key.endswith(_MODIFIERS)


def read(document: Document) -> Config:
    """Read a file.

    Raises:
        QsensError: If a value is of a wrong type, or llm-compressor would not take it.

    """
    problems: list[Problem] = []
    fields = ConfigFields(document.value, str(document.path), problems)
    steps: list[list[Rule]] = []
    smoothers: list[Smoother] = []
    for key in [key for key in document.value if isinstance(key, str)]:
        if key.endswith(_STAGE):
            stage = fields.inner(key)
            if stage is not None:
                _stage(stage, [inner for inner in document.value[key] if isinstance(inner, str)], steps, smoothers)
        elif _is_modifiers(key):  # llm-compressor leaves these out without a word
            fields.problem(
                key, "modifiers outside of a stage: llm-compressor leaves them out. Put them under a '..._stage'"
            )
            fields.take(key)
    fields.skip("args", "version")
    fields.finish()
    if not steps:
        raise QsensError(
            f"{document.path}: no modifier in it quantizes ({', '.join(_QUANTIZING)} do). Give the recipe that does."
        )
    last_first = tuple(tuple(step) for step in reversed(steps))
    rules = tuple(rule for step in last_first for rule in step)
    about = "recipe of llm-compressor"
    return Recipe(str(document.path), NAME, about, rules, tuple(problems), last_first, tuple(smoothers))


@dataclass(frozen=True)
class Recipe(Config):
    """Rules of each quantizing modifier, of the last one first; and what is smoothed before they quantize.

    ``smoothed`` are the scales of layers by name, once they are known.
    """

    steps: tuple[tuple[Rule, ...], ...] = ()
    smoothers: tuple[Smoother, ...] = ()
    smoothed: Mapping[str, SmoothQuant] | None = None

    def of_model(self, ops: Sequence[Op], tree: Callable[[], ModuleTree] | None) -> Recipe:
        """Find out which layers are smoothed."""
        if not self.smoothers:
            return self
        found = smoothed_by_name(self.smoothers, ops) if tree is None else smoothed_in(self.smoothers, tree())
        return replace(self, smoothed=found[0], problems=(*self.problems, *found[1]))

    def decide(self, op: Op) -> Decision:
        """Take what the last modifier that quantizes the op says; one that ignores it leaves it as it is."""
        smoothed = smoothed_by_name(self.smoothers, [op])[0] if self.smoothed is None else self.smoothed
        decisions = [Config(self.path, self.format, self.about, step).decide(op) for step in self.steps]
        found = next((it for it in decisions if it.scheme is not None), decisions[0])
        matching = tuple(rule for decision in decisions for rule in decision.matching)
        scheme = found.scheme
        if op.name in smoothed and isinstance(scheme, OpScheme):
            scheme = replace(scheme, smoothing=smoothed[op.name])
        return replace(found, scheme=scheme, matching=matching)


def _stage(stage: ConfigFields, keys: list[str], steps: list[list[Rule]], smoothers: list[Smoother]) -> None:
    """Read the modifiers of a stage, which come after those that are known already."""
    for key in keys:
        if not _is_modifiers(key):
            continue
        for name, value, where in stage.table(key):
            modifier = ConfigFields({} if value is None else value, where, stage.problems)
            if name in _QUANTIZING and _quantizes(name, modifier):
                steps.append(_modifier(name, modifier))
            elif name == SMOOTHER:
                smoother = read_smoother(modifier)
                if smoother is not None and steps:
                    stage.problems.append(
                        Problem(where, f"{name} comes after a modifier that quantizes, and is left out. Put it before")
                    )
                elif smoother is not None:
                    smoothers.append(smoother)
            else:
                stage.problems.append(
                    Problem(
                        where,
                        f"{name} changes numbers and is not simulated: {_shown(value)}. Score the model that "
                        "it leaves, or take it out of the recipe",
                    )
                )
    stage.skip("run_type")
    stage.finish()


def _quantizes(name: str, fields: ConfigFields) -> bool:
    """AWQ quantized itself before llm-compressor 0.9; now another modifier follows it."""
    return name != "AWQModifier" or bool(fields.peek("scheme") or fields.peek("config_groups"))


def _shown(value: object) -> str:
    return "no options" if not value else as_text(value)


def _modifier(name: str, fields: ConfigFields) -> list[Rule]:
    if name in _ROUNDING:
        fields.problems.append(Problem(fields.where, f"{_ROUNDING[name]}, which is not simulated"))
        fields.skip(*_OF_ROUNDING)
    fields.skip(*_NO_EFFECT)
    cached = read_cache(fields, "kv_cache_scheme")
    observer = _observer(fields)
    targets = fields.texts_of("targets") or [("Linear", f"{fields.where}, default targets")]
    ignore = fields.texts_of("ignore")
    entries = fields.table("config_groups")
    groups = [read_group(*entry, fields.problems) for entry in entries]
    if groups and fields.peek("scheme") is not None:
        raise QsensError(f"{fields.where}: there are both 'scheme' and 'config_groups'. Keep one of the two.")
    groups += _schemes(fields, targets)
    fields.finish()
    if observer:
        if observer != "minmax" and any(_is_local(scheme) for _, scheme, _ in groups):
            why = f"scales of tensors beside local ones are found by {observer}, which is not simulated (minmax is)"
            fields.problems.append(Problem(fields.where, why))
        groups = [(of, observed(scheme, observer), group) for of, scheme, group in groups]
    if not groups and not cached:
        raise QsensError(f"{fields.where}: there is neither 'scheme' nor 'config_groups'. Say how to quantize.")
    return [*attention_rules(entries, ignore, cached), *cached, *ordered(groups, ignore, fields.problems)]


def _is_local(scheme: OpScheme | Unknown | None) -> bool:
    return isinstance(scheme, OpScheme) and scheme.activation is not None and scheme.activation.kind == "local"


def _observer(fields: ConfigFields) -> str:
    """Read what overrides the observers of schemes: ours for static activations, empty if nothing does."""
    given = {part: (f"{part}_observer", fields.optional_text(f"{part}_observer")) for part in _OBSERVED}
    every = fields.inner("observer")
    if every is not None:  # takes precedence
        for part, key in _OBSERVED.items():
            name = every.optional_text(key)
            given[part] = ("observer", name) if name is not None else given[part]
        every.finish()
    named_by_llm_compressor(fields, *given["weight"], None)
    found = named_by_llm_compressor(fields, *given["input"], "static")
    if given["output"][1] is not None and named_by_llm_compressor(fields, *given["output"], "static") != found:
        fields.problem(given["output"][0], "outputs are observed in another way than inputs, which is not simulated")
    return found


_OBSERVED = {"weight": "weights", "input": "input", "output": "output"}
"""Part of an op → its key in ``observer``."""


def _schemes(fields: ConfigFields, targets: list[tuple[str, str]]) -> list[Group]:
    value, where = fields.take("scheme"), fields.at("scheme")
    if value is None:
        return []
    if isinstance(value, str):
        return [(targets, preset(value, where), value)]
    entries = ConfigFields(value, where, fields.problems)
    if not isinstance(value, dict):  # `ConfigFields` has raised
        return []
    return [(entries.texts_of(name), preset(name, entries.at(name)), name) for name in value if isinstance(name, str)]
