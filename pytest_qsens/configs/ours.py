"""The format of this project: globs and schemes, the first that matches holds."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from pytest_qsens.configs.documents import as_text
from pytest_qsens.configs.fields import ConfigFields
from pytest_qsens.configs.observers import named_by_us
from pytest_qsens.configs.rules import CLASS_OF, Config, Pattern, Problem, Rule
from pytest_qsens.configs.simulated import EMBEDDING, is_simulated
from pytest_qsens.errors import QsensError
from pytest_qsens.ops import CACHED, PRODUCTS, WEIGHTLESS
from pytest_qsens.quant.op_scheme import (
    FLOATS,
    INTEGERS,
    ActivationScheme,
    OpScheme,
    SmoothQuant,
    WeightScheme,
    named,
    parse,
    usual_activation,
    usual_cache,
    usual_weight,
)
from pytest_qsens.quant.scaling_modes import POWERS_OF_TWO, SCALING_MODES

if TYPE_CHECKING:
    from pytest_qsens.configs.documents import Document
    from pytest_qsens.quant.op_scheme import Statistic

NAME = "qsens"
TITLE = "pytest-qsens (YAML, TOML or JSON: 'schema', 'rules')"
SCHEMA = 1
UNQUANTIZED = "unquantized"
_ALONE = ("cache", "attention", "products")
_OF_LAYERS = ("weight", "activation", "requantize_output")


def detect(document: Document) -> bool:
    """Whether a file is of this format."""
    return isinstance(document.value, dict) and "rules" in document.value


def read(document: Document) -> Config:
    """Read a file.

    Raises:
        QsensError: If it does not follow ``schema.json``, or names a scheme that there is not.

    """
    problems: list[Problem] = []
    fields = ConfigFields(document.value, str(document.path), problems)
    fields.schema(SCHEMA, by_hand=True)
    fields.optional_text("$schema")  # for editors
    schemes = {name: _scheme(ConfigFields(value, where, problems)) for name, value, where in _own(fields)}
    rules = [rule for number, entry in enumerate(fields.objects("rules"), 1) for rule in _rules(entry, number, schemes)]
    fields.finish()
    if not rules:
        raise QsensError(f"{fields.at('rules')}: there is no rule. Write one, for example {{ops: '*', scheme: w8a8}}.")
    return Config(str(document.path), NAME, "rules of pytest-qsens", tuple(rules), tuple(problems))


def _own(fields: ConfigFields) -> list[tuple[str, object, str]]:
    entries = fields.table("schemes")
    for name, _, where in entries:
        if name == UNQUANTIZED or parse(name) is not None:
            raise QsensError(f"{where}: the name {name!r} has a meaning already. Choose another.")
    return entries


def _rules(entry: ConfigFields, number: int, schemes: dict[str, OpScheme]) -> list[Rule]:
    globs = entry.texts_of("ops")
    if not globs:
        raise QsensError(f"{entry.at('ops')}: a name or a glob is needed, or a list of them.")
    types = _types(entry)
    scheme = _of_rule(entry, schemes)
    entry.finish()
    rules = []
    for glob, where in globs:
        label = f"rule {number}: {glob}"
        if scheme is None:
            rules.append(Rule(Pattern("glob", glob, types=types or (*CLASS_OF, *WEIGHTLESS)), scheme, label, where))
        elif scheme.products is not None:
            meant = tuple(name for name in PRODUCTS if not types or name in types)
            rules.append(Rule(Pattern("glob", glob, types=meant or ("",)), scheme, label, where))
        elif scheme.cache is not None:
            meant = tuple(name for name in CACHED if not types or name in types)
            cached = replace(scheme, queries=False)
            rules.append(Rule(Pattern("glob", glob, types=meant or ("",)), cached, label, where))
            if scheme.queries:
                rules.append(Rule(Pattern("glob", glob, types=_only(types, "q")), scheme, label, where))
        # these schemes mean embeddings, too, in a way of their own; not where a weight's scheme is given to one of them
        elif is_simulated(scheme) and (scheme.activation or not (types == ("embedding",) or _is_name(glob))):
            rules.append(Rule(Pattern("glob", glob, types=_only(types, "embedding")), EMBEDDING, label, where))
            types_left = tuple(name for name in types or (*CLASS_OF,) if name not in ("embedding", *WEIGHTLESS))
            rules.append(Rule(Pattern("glob", glob, types=types_left or ("",)), scheme, label, where))
        else:
            layers = tuple(name for name in types if name not in WEIGHTLESS)
            rules.append(Rule(Pattern("glob", glob, types=layers or (("",) if types else ())), scheme, label, where))
    return rules


def _is_name(glob: str) -> bool:
    """Whether one op alone is meant, and its scheme as it stands."""
    return not set("*?[") & set(glob)


def _only(types: tuple[str, ...], name: str) -> tuple[str, ...]:
    return (name,) if not types or name in types else ("",)


def _types(entry: ConfigFields) -> tuple[str, ...]:
    if entry.peek("types") == []:
        raise QsensError(f"{entry.at('types')}: there is no type in the list. Leave it out, or give one.")
    found = entry.texts_of("types")
    for name, where in found:
        if name not in (*CLASS_OF, *WEIGHTLESS):
            raise QsensError(f"{where}: {name!r} is no type of op. Known: {', '.join((*CLASS_OF, *WEIGHTLESS))}.")
    return tuple(name for name, _ in found)


def _of_rule(entry: ConfigFields, schemes: dict[str, OpScheme]) -> OpScheme | None:
    value = entry.take("scheme")
    where = entry.at("scheme")
    if isinstance(value, dict):
        return _scheme(ConfigFields(value, where, entry.problems))
    if not isinstance(value, str):
        raise QsensError(f"{where}: the name of a scheme or an object is needed, found {as_text(value)}.")
    if value == UNQUANTIZED:
        return None
    return schemes[value] if value in schemes else named(value, where)


def _scheme(fields: ConfigFields) -> OpScheme:
    for key in _ALONE:
        inside = fields.inner(key)
        if inside is not None:
            others = [name for name in (*_ALONE, *_OF_LAYERS) if name != key and fields.peek(name) is not None]
            if others:
                raise QsensError(f"{fields.where}: {key} goes with nothing else, but there is {' and '.join(others)}.")
            fields.finish()
            if key == "products":
                return OpScheme(None, products=_cache(inside))
            return OpScheme(None, cache=_cache(inside), queries=key == "attention")
    weight = fields.inner("weight")
    activation = fields.inner("activation")
    scheme = OpScheme(
        None if weight is None else _weight(weight),
        None if activation is None else _activation(activation),
        fields.flag("requantize_output", default=False),
        _smoothing(fields.inner("smoothquant")),
    )
    fields.finish()
    if replace(scheme, smoothing=None) == OpScheme(None):
        raise QsensError(
            f"{fields.where}: nothing is quantized. Give a weight, an activation, a cache, attention or products, "
            f"or write {UNQUANTIZED}."
        )
    return scheme


def _smoothing(fields: ConfigFields | None) -> SmoothQuant | None:
    if fields is None:
        return None
    alpha = fields.optional_number("alpha")
    alpha = SmoothQuant.alpha if alpha is None else alpha
    if not 0 <= alpha <= 1:
        raise QsensError(f"{fields.at('alpha')}: {alpha:g} is not possible, a number from 0 to 1 is")
    statistic = fields.known("statistic", ("magnitude", "range"), "magnitude")
    found = SmoothQuant(alpha, fields.flag("shared", default=True), cast("Statistic", statistic))
    fields.finish()
    return found


def _weight(fields: ConfigFields) -> WeightScheme:
    dtype = _dtype(fields)
    granularity, size = _extent(fields, ("tensor", "channel", "group", "block"), *usual_weight(dtype))
    symmetric = fields.flag("symmetric", default=True)
    scheme = WeightScheme(dtype, cast("Any", granularity), size, symmetric, _mode(fields, dtype))
    fields.finish()
    return scheme


def _activation(fields: ConfigFields) -> ActivationScheme:
    dtype = _dtype(fields)
    kind = fields.choice("kind", ("static", "dynamic", "local"))
    granularity, size, symmetric = usual_activation(dtype, kind)
    granularity, size = cast(
        "Any", _extent(fields, ("tensor", "channel", "token", "group", "block"), granularity, size)
    )
    symmetric = fields.flag("symmetric", default=symmetric)
    observer = named_by_us(fields, kind)
    scheme = ActivationScheme(dtype, cast("Any", kind), granularity, size, symmetric, observer, _mode(fields, dtype))
    fields.finish()
    return scheme


def _cache(fields: ConfigFields) -> ActivationScheme:
    dtype = _dtype(fields)
    kind = fields.choice("kind", ("static", "dynamic", "local"))
    known = ("tensor", "head", "channel", "token", "group")
    granularity, size = cast("Any", _extent(fields, known, *usual_cache(dtype, kind)))
    symmetric = fields.flag("symmetric", default=True)
    observer = named_by_us(fields, kind)
    if observer not in ("", "minmax", "moving_average"):
        raise QsensError(
            f"{fields.at('observer')}: {observer!r} is not one of minmax, moving_average, which keys and values have"
        )
    observer = "" if observer == "minmax" else observer
    scheme = ActivationScheme(dtype, cast("Any", kind), granularity, size, symmetric, observer, _mode(fields, dtype))
    fields.finish()
    return scheme


def _dtype(fields: ConfigFields) -> str:
    return fields.choice("dtype", (*INTEGERS, *FLOATS))


def _mode(fields: ConfigFields, dtype: str) -> str:
    mode = fields.optional_text("scaling_mode")
    if mode is None:
        return ""
    if dtype not in POWERS_OF_TWO:
        known = ", ".join(POWERS_OF_TWO)
        raise QsensError(f"{fields.at('scaling_mode')}: scales of {dtype} have no mode, those of {known} have")
    if mode not in SCALING_MODES:
        raise QsensError(f"{fields.at('scaling_mode')}: {mode!r} is not one of {', '.join(SCALING_MODES)}")
    return mode


def _extent(
    fields: ConfigFields, known: tuple[str, ...], granularity: str, size: tuple[int, ...]
) -> tuple[str, tuple[int, ...]]:
    """Granularity and size, ``granularity`` and ``size`` if the file gives neither."""
    given = fields.optional_text("granularity")
    if given is not None and given not in known:
        raise QsensError(f"{fields.at('granularity')}: {given!r} is not one of {', '.join(known)}")
    group = fields.integer("group_size")
    block = fields.take("block")
    if group is not None and group < 1:
        raise QsensError(f"{fields.at('group_size')}: {group} is not possible, at least 1 is needed.")
    if (group is not None) != (given == "group") or (block is not None) != (given == "block"):
        raise QsensError(
            f"{fields.where}: granularity {given!r} does not go with "
            f"group_size {as_text(group)} and block {as_text(block)}. A group needs group_size, a block needs block: "
            "[rows, columns], and nothing else has one."
        )
    if given is None:
        return granularity, size
    if given == "block":
        if type(block) is not list or len(block) != 2 or any(type(n) is not int or not 0 < n < 10**9 for n in block):
            raise QsensError(f"{fields.at('block')}: [rows, columns] is needed, found {as_text(block)}.")
        return given, tuple(block)
    return given, (group,) if group is not None else ()
