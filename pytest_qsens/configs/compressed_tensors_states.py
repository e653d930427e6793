"""compressed-tensors: how queries, keys and values of attention are rounded, all alike or by groups of modules."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pytest_qsens.configs.compressed_tensors_arguments import MODES, arguments, read_observer
from pytest_qsens.configs.fields import ConfigFields
from pytest_qsens.configs.observers import LLM_COMPRESSORS_DEFAULT
from pytest_qsens.configs.rules import Pattern, Rule
from pytest_qsens.errors import QsensError
from pytest_qsens.ops import CACHED
from pytest_qsens.quant.op_scheme import ActivationScheme, OpScheme, Unknown

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pytest_qsens.quant.op_scheme import Granularity, Kind

REGEX = "re:"
"""What is in front of a target that is an expression."""


def read_cache(fields: ConfigFields, key: str, default: str = LLM_COMPRESSORS_DEFAULT) -> list[Rule]:
    """Read how keys and values of all attention modules are quantized; no rule if they are not.

    ``default`` is the observer of a tool that names none, by its name in llm-compressor.
    """
    if fields.peek(key) in (None, "NONE", "none"):
        fields.take(key)
        return []
    inside = fields.inner(key)
    return [] if inside is None else [cache_rule(_cache(inside, default), key, inside.where)]


def cache_rule(scheme: OpScheme | Unknown, label: str, where: str) -> Rule:
    """Return the rule of a scheme of all keys and values."""
    return Rule(Pattern("any", "", types=CACHED), scheme, label, where)


def _cache(fields: ConfigFields, default: str = LLM_COMPRESSORS_DEFAULT) -> OpScheme | Unknown:
    dtype, strategy, size, symmetric, dynamic = arguments(fields)
    kind: Kind = "local" if dynamic == "local" else "dynamic" if dynamic else "static"
    observer = read_observer(fields, kind, default)
    if observer == "mse":  # was told; keys and values have none that is near
        observer = "minmax"
    fields.changes_numbers("actorder", "keys and values have none", False)
    fields.finish()
    if strategy == "tensor_group" and dtype != "nvfp4":
        return Unknown(f"{dtype} tensor_group", f"keys and values are {dtype} with scales of groups and of the tensor")
    if strategy == "token":
        return Unknown(f"{dtype} token", "keys and values have a scale for each head of each sample, not of each token")
    granularity: Granularity = "tensor"
    if strategy in ("group", "tensor_group"):
        granularity = "group"
    elif strategy == "attn_head":
        granularity = "head"
    elif strategy != "tensor":
        raise QsensError(f"{fields.where}: keys and values have no strategy {strategy!r}.")
    observer = "" if observer == "minmax" else observer  # the usual one, whatever the dtype
    cache = ActivationScheme(dtype, kind, granularity, size, symmetric, observer, MODES.get(dtype, ""))
    return OpScheme(None, cache=cache)


def attention_rules(
    entries: Sequence[tuple[str, object, str]], ignore: Iterable[tuple[str, str]], cached: Sequence[Rule]
) -> list[Rule]:
    """Read which entries of ``config_groups`` mean attention modules, and quantize queries, keys and values.

    They go before the scheme of the cache, which remains where a module is ignored, or where what matches first is no
    target of attention. A class is that of attention modules if its name says so. An expression that matches children
    of a module, too, quantizes it if another target of its group means the module alone.
    """
    targets: dict[str, tuple[OpScheme | Unknown | None, str, str]] = {}
    beside: dict[str, list[str]] = {}
    for name, value, where in entries:
        fields = ConfigFields(value if isinstance(value, dict) else {"targets": value}, where, [])  # told elsewhere
        inputs = value.get("input_activations") if isinstance(value, dict) and not value.get("weights") else None
        scheme = None
        if isinstance(inputs, dict):
            scheme = _cache(ConfigFields(inputs, fields.at("input_activations"), fields.problems))
        own = fields.texts_of("targets")
        targets |= {text: (scheme, f"{name}: {text}", place) for text, place in own}
        beside |= {text: [other for other, _ in own] for text, _ in own}
    if all(scheme is None for scheme, _, _ in targets.values()):
        return []
    rest = cached[0].scheme if cached else None
    rules = [
        rule for text, where in ignore for rule in _of_attention(_of_module(text), rest, None, f"ignore: {text}", where)
    ]
    for text in sorted(targets, key=lambda text: (_rank(text), text)):
        scheme, label, place = targets[text]
        pattern = _of_module(text)
        if scheme is not None:
            narrow = _narrowed(pattern, beside[text]) if pattern.kind == "module_start" else pattern
            queries = scheme if isinstance(scheme, Unknown) else replace(scheme, queries=True)
            rules += _of_attention(narrow, scheme, queries, label, place, _rank(text))
        if pattern.kind == "module_start" or (pattern.kind == "module" and scheme is None):
            rules += _of_attention(pattern, rest, None, label, place)
    return rules


def _narrowed(pattern: Pattern, targets: Sequence[str]) -> Pattern:
    """Return what an expression means of attention, given all targets of its group."""
    if any(map(_is_class_of_attention, targets)):
        return pattern  # a class means each of its modules alone
    expressions = (text.removeprefix(REGEX) if text.startswith(REGEX) else rf"{re.escape(text)}\Z" for text in targets)
    return replace(pattern, kind="module_narrow", beside=tuple(expressions))


def _rank(text: str) -> int:
    """Place in the order in which targets of attention hold: names, expressions, classes."""
    return 1 if text.startswith(REGEX) else 2 if _is_class_of_attention(text) else 0


def _is_class_of_attention(text: str) -> bool:
    return "attention" in text.lower() and text.isidentifier()


def _of_module(text: str) -> Pattern:
    kind: Literal["module", "module_start", "any"] = "any" if _is_class_of_attention(text) else "module"
    return Pattern("module_start" if text.startswith(REGEX) else kind, text.removeprefix(REGEX))


def _of_attention(
    pattern: Pattern,
    scheme: OpScheme | Unknown | None,
    queries: OpScheme | Unknown | None,
    label: str,
    where: str,
    rank: int | None = None,
) -> list[Rule]:
    """Rules for keys and values, and for queries, of the modules that a pattern means."""
    return [
        Rule(replace(pattern, types=types), each, label, where, rank=rank)
        for types, each in ((CACHED, scheme), (("q",), queries))
    ]
