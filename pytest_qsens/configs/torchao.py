"""torchao: ``FqnToConfig``, or one config for all linear layers, as ``torchao.core.config.config_to_dict`` writes it.

Semantics are those of torchao 0.18, ``quantize_`` with ``FqnToConfig``: a key is the exact name of a parameter or a
module, a regular expression after ``re:`` for the whole of such a name, or ``_default``. They hold in this order:
parameter by name, module by name, parameter by expression, module by expression (the first), ``_default``, for linear
layers only. Of expressions for a parameter every one is applied that is not ``None``, whatever comes first in the file;
two of them cannot be.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from glob import escape
from typing import TYPE_CHECKING

from pytest_qsens.configs.fields import ConfigFields
from pytest_qsens.configs.rules import Config, Decision, Pattern, Problem, Rule, regex
from pytest_qsens.configs.torchao_schemes import opened, scheme_of, sizes_in_the_way
from pytest_qsens.errors import QsensError
from pytest_qsens.quant.op_scheme import OpScheme, Unknown

if TYPE_CHECKING:
    from pytest_qsens.configs.documents import Document
    from pytest_qsens.ops import Op

NAME = "torchao"
TITLE = "torchao (JSON of config_to_dict: '_type', '_data')"

_MAPS = ("FqnToConfig", "ModuleFqnToConfig")
_REGEX, _DEFAULT, _PARAMETER = "re:", "_default", ".weight"
_PARAMETER_NAME, _MODULE_NAME, _PARAMETER_REGEX, _MODULE_REGEX, _LAST = range(5)


def detect(document: Document) -> bool:
    """Whether a file is of this format."""
    value = document.value
    return isinstance(value, dict) and (("_type" in value and "_data" in value) or _hugging_face(value) is not None)


def _hugging_face(value: dict[str, object]) -> dict[str, object] | None:
    """``quantization_config`` of a ``config.json``, or that object alone."""
    inside = value.get("quantization_config", value)
    return inside if isinstance(inside, dict) and inside.get("quant_method") == NAME else None


def read(document: Document) -> Config:
    """Read a file.

    Raises:
        QsensError: If a value is of a wrong type, or torchao would not take it.

    """
    problems: list[Problem] = []
    value, where = document.value, str(document.path)
    before: list[Rule] = []
    inside = _hugging_face(value) if isinstance(value, dict) else None
    if inside is not None:
        value, where, before = _unwrap(ConfigFields(inside, where, problems))
    name, data = opened(value, where, problems)
    if name in _MAPS:
        rules = (*before, *_rules(data, problems))
        return FqnToConfig(str(document.path), NAME, "FqnToConfig of torchao", rules, tuple(problems))
    rule = Rule(Pattern("any", "", types=("linear",)), scheme_of(name, data), f"all linear layers: {name}", where)
    return OneConfig(str(document.path), NAME, "config of torchao", (*before, rule), tuple(problems))


def _unwrap(fields: ConfigFields) -> tuple[object, str, list[Rule]]:
    """Take torchao's config out of transformers' one, and what transformers leaves unquantized."""
    fields.skip("quant_method", "quant_type_kwargs", "untie_embedding_weights")
    quant_type = fields.inner("quant_type")
    if quant_type is None:
        raise QsensError(f"{fields.at('quant_type')}: an object is needed, found nothing")
    value, where = quant_type.take("default"), quant_type.at("default")
    quant_type.finish()
    rules = []
    given = fields.peek("modules_to_not_convert") is not None
    for text, place in fields.texts_of("modules_to_not_convert"):
        # transformers.quantizers.quantizers_utils.should_convert_module, with the name of the weight
        expression = rf"(?:{regex(text, place)})(?:(?<=\.)|(?=\.|$))"
        start = Pattern("regex_start", expression, (_PARAMETER,))
        end = Pattern("wildcard", f"*{escape(text)}", (_PARAMETER,))
        rules += [Rule(pattern, None, f"modules_to_not_convert: {text}", place) for pattern in (start, end)]
    if not fields.flag("include_input_output_embeddings", default=False) and not given:
        rules.append(Rule(Pattern("name", "lm_head"), None, "transformers' default", where, expected=False))
    fields.finish()
    return value, where, rules


def _as_applied(decision: Decision) -> Decision:
    """Tell of an op that torchao leaves as it is, or refuses, because of the sizes of its weight."""
    scheme = decision.scheme
    why = sizes_in_the_way(scheme, decision.op) if isinstance(scheme, OpScheme) else None
    return decision if why is None or scheme is None else replace(decision, scheme=Unknown(scheme.name, why))


@dataclass(frozen=True)
class OneConfig(Config):
    """One config for all linear layers."""

    def decide(self, op: Op) -> Decision:
        """Let sizes of weights matter."""
        return _as_applied(super().decide(op))


@dataclass(frozen=True)
class FqnToConfig(Config):
    """Rules with the rank of their kind of key."""

    def decide(self, op: Op) -> Decision:
        """Follow ``_fqn_to_config_handler``; sizes of weights matter, too."""
        return _as_applied(self._decide(op))

    def _decide(self, op: Op) -> Decision:
        found = [rule for rule in self.rules if rule.pattern.matches(op)]
        if not found:
            return Decision(op, None, None)
        first = found[0]
        if first.rank is None:  # transformers comes before torchao
            return Decision(op, first.scheme, first, tuple(found))
        rivals: list[Rule] = []
        if first.rank == _PARAMETER_REGEX or (first.rank == _PARAMETER_NAME and first.scheme is not None):
            expressions = [rule for rule in found if rule.rank == _PARAMETER_REGEX]
            applied = [rule for rule in expressions if rule.scheme is not None]
            if first.rank == _PARAMETER_REGEX and applied:
                # a `None` in front of it has no effect, against torchao's documentation
                rivals = [rule for rule in expressions[: expressions.index(applied[0])] if rule.scheme is None]
                first = applied[0]
            rivals += [rule for rule in applied if rule is not first]  # what is quantized once cannot be again
        return Decision(op, first.scheme, first, tuple(found), tuple(rivals))


def _rules(data: ConfigFields, problems: list[Problem]) -> list[Rule]:
    entries, others = data.table("fqn_to_config"), data.table("module_fqn_to_config")
    if entries and others and [entry[:2] for entry in entries] != [entry[:2] for entry in others]:
        raise QsensError(
            f"{data.where}: 'fqn_to_config' and 'module_fqn_to_config' are not equal. torchao refuses this; keep one."
        )
    data.finish()
    rules = []
    for key, value, where in entries or others:
        scheme = None if value is None else scheme_of(*opened(value, where, problems))
        for pattern, rank in _patterns(key, where):
            rules.append(Rule(pattern, scheme, key, where, rank=rank))
    if not rules:
        raise QsensError(f"{data.where}: there is no entry in 'fqn_to_config'. Nothing would be quantized.")
    return sorted(rules, key=lambda rule: rule.rank or 0)


def _patterns(key: str, where: str) -> list[tuple[Pattern, int]]:
    if key == _DEFAULT:
        return [(Pattern("any", "", types=("linear",)), _LAST)]
    if key.startswith(_REGEX):
        text = regex(key.removeprefix(_REGEX), where)
        return [(Pattern("regex", text, (_PARAMETER,)), _PARAMETER_REGEX), (Pattern("regex", text), _MODULE_REGEX)]
    return [(Pattern("name", key, (_PARAMETER,)), _PARAMETER_NAME), (Pattern("name", key), _MODULE_NAME)]
