"""ModelOpt's ``quant_cfg``: attributes of the quantizers that stand before a weight, an input and an output.

Semantics are those of ModelOpt 0.47, ``set_quantizer_by_cfg``. Entries are wildcards for names of quantizers, and the
last one that matches holds: one with ``cfg`` replaces all attributes, one with ``enable`` alone switches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from pytest_qsens.configs.documents import as_text
from pytest_qsens.configs.fields import ConfigFields
from pytest_qsens.configs.observers import observed
from pytest_qsens.configs.rules import CLASS_OF, Config, Decision, Pattern, Problem, Rule
from pytest_qsens.errors import QsensError
from pytest_qsens.files import typed
from pytest_qsens.ops import CACHED, PRODUCTS, STATES
from pytest_qsens.quant.op_scheme import ActivationScheme, OpScheme, SmoothQuant, Unknown, WeightScheme

if TYPE_CHECKING:
    from pytest_qsens.configs.documents import Document
    from pytest_qsens.ops import Op
    from pytest_qsens.quant.op_scheme import Granularity

_WEIGHT, _INPUT, _OUTPUT = ".weight_quantizer", ".input_quantizer", ".output_quantizer"
_QUANTIZERS = (_WEIGHT, _INPUT, _OUTPUT)


@dataclass(frozen=True)
class _Attributes:
    """Attributes of one quantizer; ``part`` is set where terms exist for them."""

    weight: WeightScheme | Unknown
    activation: ActivationScheme | Unknown


@dataclass(frozen=True)
class _Entry:
    rule: Rule
    enable: bool
    attributes: _Attributes | None


@dataclass(frozen=True)
class _Calibration:
    """An ``algorithm``: static scales are of the largest magnitude, maybe after SmoothQuant (``model_calib.py``)."""

    smoothing: SmoothQuant | None = None

    def of(self, op: Op, scheme: OpScheme | Unknown | None) -> OpScheme | Unknown | None:
        """Return a scheme with what it does to it: linear layers in int8 are smoothed, each with scales of its own."""
        scheme = observed(scheme, "minmax")
        if self.smoothing is None or op.type != "linear" or not isinstance(scheme, OpScheme):
            return scheme
        weight, activation = scheme.weight, scheme.activation
        of_bytes = weight is not None and activation is not None and weight.dtype == activation.dtype == "int8"
        per_tensor = activation is not None and (activation.kind, activation.granularity) == ("static", "tensor")
        return replace(scheme, smoothing=self.smoothing) if of_bytes and per_tensor else scheme


@dataclass(frozen=True)
class QuantCfg(Config):
    """Entries of ``quant_cfg`` in the order of the file, and how what they leave open is found."""

    entries: tuple[_Entry, ...] = ()
    calibration: _Calibration = _Calibration()

    def decide(self, op: Op) -> Decision:
        """Go through the entries for each of the op's three quantizers; the last one that matches holds."""
        if op.type in STATES:
            return self._decide_state(op)
        if op.type in PRODUCTS:  # its quantizers are of what attention is given, and of nothing inside
            return Decision(op, None, None)
        parts: list[_Attributes | None] = []
        matching: list[Rule] = []
        deciding: Rule | None = None
        for suffix in _QUANTIZERS:
            enabled, attributes = suffix != _OUTPUT, _DEFAULT
            for entry in self.entries:
                pattern = Pattern("wildcard", entry.rule.pattern.text, (suffix,), entry.rule.pattern.types)
                if pattern.matches(op):
                    matching.append(entry.rule)
                    enabled = entry.enable
                    attributes = entry.attributes or attributes
                    # an output that stays off says nothing about the op
                    deciding = entry.rule if suffix == _WEIGHT else deciding
            parts.append(attributes if enabled else None)
        matching = [*dict.fromkeys(reversed(matching))]
        scheme = self.calibration.of(op, _assembled(op, *parts))
        rule = deciding or (matching[0] if matching else None)
        return Decision(op, scheme, rule, tuple(matching))

    def _decide_state(self, op: Op) -> Decision:
        """Ask for the one quantizer of queries, keys or values, which does nothing until an entry switches it on."""
        module, _, kind = op.name.rpartition(":")
        name = f"{module}.{kind}_bmm_quantizer" if module else f"{kind}_bmm_quantizer"
        matching = [
            entry
            for entry in self.entries
            if not entry.rule.pattern.types and fnmatchcase(name, entry.rule.pattern.text)
        ]
        if not matching:
            return Decision(op, None, None)
        attributes = next((entry.attributes for entry in reversed(matching) if entry.attributes), _DEFAULT)
        cached = attributes.activation
        queries = op.type not in CACHED
        scheme: OpScheme | Unknown | None
        if isinstance(cached, ActivationScheme):  # static scales are of the extremes
            scheme = OpScheme(None, cache=replace(cached, observer=""), queries=queries)
        else:
            scheme = cached
        rules = tuple(dict.fromkeys(entry.rule for entry in reversed(matching)))
        return Decision(op, scheme if matching[-1].enable else None, rules[0], rules)


def _assembled(
    op: Op, weight: _Attributes | None, inputs: _Attributes | None, output: _Attributes | None
) -> OpScheme | Unknown | None:
    if op.type == "embedding":
        inputs = None  # indices are not quantized
    found = [None if weight is None else weight.weight, None if inputs is None else inputs.activation]
    after = None if output is None else output.activation
    for part in (*found, after):
        if isinstance(part, Unknown):
            return part
    scheme = OpScheme(found[0], found[1], after is not None)  # type: ignore[arg-type]  # no `Unknown` is left
    return None if scheme == OpScheme(None) else scheme


def read_quant_cfg(document: Document, name: str) -> Config:
    """Read an object with ``quant_cfg``.

    Args:
        document: The file.
        name: Of the format.

    Raises:
        QsensError: If a value is of a wrong type, or ModelOpt would not take it.

    """
    problems: list[Problem] = []
    fields = ConfigFields(document.value, str(document.path), problems)
    value, where = fields.take("quant_cfg"), fields.at("quant_cfg")
    calibration = _calibration(fields)
    fields.finish()
    if isinstance(value, dict):
        pairs = [(name, entry, f"{where}, {as_text(name)}") for name, entry in value.items()]
        raw = [each for pair in pairs for each in _legacy(*pair)]
    else:
        raw = [
            each
            for number, entry in enumerate(typed(value, list, where), 1)
            for each in _listed(entry, f"{where}, entry {number}")
        ]
    entries = tuple(_entry(ConfigFields(entry, place, problems)) for entry, place in raw)
    if not entries:
        raise QsensError(f"{where}: there is no entry. Nothing would be said about any op.")
    rules = tuple(entry.rule for entry in entries)
    return QuantCfg(str(document.path), name, "quant_cfg of ModelOpt", rules, tuple(problems), entries, calibration)


def _calibration(fields: ConfigFields) -> _Calibration:
    """Read ``algorithm``: its name, or an object with it as ``method``; ``max`` if the file has none."""
    value, where = fields.take("algorithm"), fields.at("algorithm")
    inside = ConfigFields(value if isinstance(value, dict) else {"method": value}, where, fields.problems)
    method = inside.optional_text("method")
    if method == "smoothquant":
        alpha = inside.optional_number("alpha")
        alpha = _ALPHA if alpha is None else alpha
        if not 0 <= alpha <= 1:
            raise QsensError(f"{inside.at('alpha')}: {alpha:g} is not possible, ModelOpt takes a number from 0 to 1")
        inside.finish()
        return _Calibration(SmoothQuant(alpha, shared=False))
    if method not in (None, "max"):
        known = "'max' and 'smoothquant' are"
        fields.problem("algorithm", f"{as_text(value)} changes numbers and is not simulated: {known}")
        return _Calibration()
    inside.finish()
    return _Calibration()


_ALPHA = 1.0
"""Strength of its SmoothQuant where none is given (``SmoothQuantCalibConfig``)."""


def _listed(entry: object, where: str) -> list[tuple[object, str]]:
    if isinstance(entry, dict) and "quantizer_name" not in entry and len(entry) == 1:
        ((name, value),) = entry.items()
        return _legacy(name, value, where)
    return [(entry, where)]


def _legacy(name: object, value: object, where: str) -> list[tuple[object, str]]:
    """One entry of the older form, wildcard → attributes, in the newer one."""
    key: str = typed(name, str, where)
    if key.startswith("nn."):
        inner: dict[object, object] = typed(value, dict, where)
        return [({**_split(sub, attributes, where), "parent_class": key}, where) for sub, attributes in inner.items()]
    return [(_split("*" if key == "default" else key, value, where), where)]


def _split(name: object, value: object, where: str) -> dict[str, object]:
    if isinstance(value, list):
        return {"quantizer_name": name, "cfg": value}
    attributes: dict[object, object] = dict(typed(value, dict, where))
    enable = attributes.pop("enable", None)
    return {"quantizer_name": name, "cfg": attributes or None, "enable": enable}


def _entry(fields: ConfigFields) -> _Entry:
    name = fields.text("quantizer_name")
    parent = fields.optional_text("parent_class")
    cfg = fields.take("cfg")
    if cfg is None and fields.peek("enable") is None:
        raise QsensError(f"{fields.where}: {name!r} has neither 'cfg' nor 'enable'. ModelOpt refuses this; give one.")
    enable = fields.flag("enable", default=True)
    attributes = None
    if isinstance(cfg, list):
        reason = "values are rounded by several quantizers one after the other"
        attributes = _Attributes(Unknown("sequential", reason), Unknown("sequential", reason))
    elif cfg is not None:
        attributes = _attributes(ConfigFields(cfg, fields.at("cfg"), fields.problems))
    fields.finish()
    types: tuple[str, ...] = ()
    if parent is not None:
        types = tuple(kind for kind, cls in CLASS_OF.items() if parent == f"nn.{cls}") or ("",)
    label = f"{name} ({parent})" if parent else name
    # entries for quantizers that ops do not have, and for other architectures, are the rule in ModelOpt's own files
    rule = Rule(
        Pattern("wildcard", name, _QUANTIZERS, types),
        None,
        f"{label}: {'on' if enable else 'off'}",
        fields.where,
        expected=False,
        partial=True,
    )
    return _Entry(rule, enable, attributes)


_NUM_BITS = {
    (4, 3): "fp8_e4m3",
    (5, 2): "fp8_e5m2",
    (2, 1): "fp4_e2m1",
    (2, 3): "fp6_e2m3",
    (3, 2): "fp6_e3m2",
}
_MX = {"fp8_e4m3": "mxfp8", "fp4_e2m1": "mxfp4", "fp6_e2m3": "mxfp6", "int8": "mxint8"}


def _attributes(fields: ConfigFields) -> _Attributes:
    fields.skip(
        "fake_quant", "effective_bits", "trt_high_precision_dtype", "calibrator", "pass_through_bwd", "learn_amax"
    )
    fields.changes_numbers("unsigned", "values are taken as positive", False)
    fields.changes_numbers("narrow_range", "the lowest integer is left out", False)
    fields.changes_numbers("bias", "values are shifted before they are rounded", {})
    for key in ("rotate", "use_constant_amax", "backend"):
        fields.changes_numbers(key, "values are changed in another way, too", False)
    dtype = _num_bits(fields)
    axis = fields.take("axis")
    dynamic = fields.known("type", ("static", "dynamic"), "static") == "dynamic"
    blocks = fields.inner("block_sizes") if fields.peek("block_sizes") is not None else None
    fields_where = fields.where
    weight: WeightScheme | Unknown
    activation: ActivationScheme | Unknown
    if blocks is not None:
        weight, activation = _blocks(blocks, dtype, dynamic=dynamic)
    elif axis is None:
        kind: Literal["static", "dynamic"] = "dynamic" if dynamic else "static"
        weight, activation = WeightScheme(dtype, "tensor"), ActivationScheme(dtype, kind, "tensor")
    elif type(axis) is int and axis == 0:
        weight = WeightScheme(dtype)
        activation = Unknown("axis 0", "activations have a scale for each sample of a batch")
    else:
        reason = f"{fields_where}: scales along axis {as_text(axis)}, which has no name here"
        weight, activation = Unknown("axis", reason), Unknown("axis", reason)
    fields.finish()
    return _Attributes(weight, activation)


def _num_bits(fields: ConfigFields) -> str:
    value = fields.take("num_bits")
    if value is None:
        return "int8"
    if type(value) is int and 1 <= value <= 16:
        return f"int{value}"
    if isinstance(value, str) and len(value) == 4 and value[0] == "e" and value[2] == "m":
        value = [int(digit) if digit.isdecimal() else digit for digit in (value[1], value[3])]
    if isinstance(value, list | tuple) and all(type(part) is int for part in value):
        name = _NUM_BITS.get(tuple(value))
        if name is not None:
            return name
    raise QsensError(f"{fields.at('num_bits')}: {as_text(value)} is no precision that is known here, as 8 or [4, 3] is")


def _blocks(
    fields: ConfigFields, dtype: str, *, dynamic: bool
) -> tuple[WeightScheme | Unknown, ActivationScheme | Unknown]:
    sizes = {axis: size for axis in (-1, -2) if (size := _size(fields, axis)) != 0}
    local = fields.known("type", ("static", "dynamic"), "static") == "dynamic"
    bits = fields.take("scale_bits")
    scales = (
        tuple(bits)
        if isinstance(bits, list | tuple)
        else {"e8m0": (8, 0), "e4m3": (4, 3)}.get(bits if isinstance(bits, str) else "")
    )
    fields.finish()
    if set(sizes) == {-1} and sizes[-1] is None:  # one block is a whole row
        return WeightScheme(dtype), ActivationScheme(dtype, "dynamic" if dynamic or local else "static", "token")
    if None in sizes.values() or -1 not in sizes:
        reason = "blocks that have no name here"
        return Unknown("blocks", reason), Unknown("blocks", reason)
    granularity: Granularity = "block" if -2 in sizes else "group"
    extent = tuple(size for axis in (-2, -1) if (size := sizes.get(axis)) is not None)
    kind: Literal["static", "dynamic", "local"] = "dynamic" if dynamic or local else "static"
    if scales == (8, 0):
        dtype = _MX.get(dtype, dtype)
    elif scales == (4, 3) and dtype == "fp4_e2m1":
        dtype = "nvfp4"
        kind = "local" if local else kind
    return WeightScheme(dtype, granularity, extent), ActivationScheme(dtype, kind, granularity, extent)


def _size(fields: ConfigFields, axis: int) -> int | None:
    """Size of the block along an axis; 0 if the axis is not there, ``None`` for all of it."""
    for key in (str(axis), axis):  # JSON's keys are text
        if key in fields.unread():
            value = fields.take(key)
            if value is None:
                return None
            if type(value) is not int or not 0 < value < 10**9:
                raise QsensError(f"{fields.where}, {key!r}: a size is needed, found {as_text(value)}")
            return value
    return 0


_DEFAULT = _Attributes(WeightScheme("int8", "tensor"), ActivationScheme("int8", "static", "tensor"))
"""A quantizer that is switched on and told nothing else."""
