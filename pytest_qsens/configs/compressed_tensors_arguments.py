"""compressed-tensors' ``QuantizationArgs``: how one tensor is rounded, and what finds its scales."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qsens.configs.documents import as_text
from pytest_qsens.configs.observers import LLM_COMPRESSORS_DEFAULT, check_averaging, named_by_llm_compressor
from pytest_qsens.errors import QsensError

if TYPE_CHECKING:
    from pytest_qsens.configs.fields import ConfigFields
    from pytest_qsens.quant.op_scheme import Kind

MODES = {"mxfp8": "rceil", "mxfp6": "even", "mxfp4": "even"}
"""How it finds scales that are powers of two (``generate_mx_scales``). Of E4M3 it rounds the largest magnitude to the
mantissa of E2M1, which is RCEIL but for magnitudes of exactly 448 times a power of two, whose scales it doubles."""

_STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")


def read_observer(fields: ConfigFields, kind: Kind | None, default: str = LLM_COMPRESSORS_DEFAULT) -> str:
    """Read ``observer``; without a kind, as that of a weight."""
    name = fields.optional_text("observer")
    if name is None and kind in ("static", "local"):
        name = default
    found = named_by_llm_compressor(fields, "observer", name, kind)
    check_averaging(fields, found)
    return found


def arguments(fields: ConfigFields) -> tuple[str, str, tuple[int, ...], bool, bool | str]:
    """Read ``QuantizationArgs``: dtype, strategy, size of a group or block, symmetric, dynamic."""
    bits = fields.integer("num_bits")
    bits = 8 if bits is None else bits
    kind = fields.known("type", ("int", "float"), "int")
    symmetric = fields.flag("symmetric", default=True)
    group = fields.integer("group_size")
    block = _block(fields)
    strategy = fields.known("strategy", _STRATEGIES, "")
    if not strategy:  # inferred, as compressed-tensors does it
        strategy = "tensor" if group is None else "group" if group > 0 else "channel"
    if (strategy in ("group", "tensor_group")) != (group is not None and group > 0):
        raise QsensError(f"{fields.where}: strategy {strategy!r} does not go with group_size {as_text(group)}.")
    if (strategy == "block") != (block is not None):
        raise QsensError(f"{fields.where}: strategy {strategy!r} does not go with block_structure {as_text(block)}.")
    dynamic = fields.take("dynamic")
    if type(dynamic) is not bool and dynamic not in (None, "local"):
        raise QsensError(f"{fields.at('dynamic')}: true, false or 'local' is needed, found {as_text(dynamic)}")
    scale = fields.optional_text("scale_dtype")
    fields.skip("zp_dtype")
    dtype = _dtype(fields, bits, kind, strategy, group, scale)
    size = tuple(block) if block is not None else (group,) if group is not None and group > 0 else ()
    return dtype, strategy, size, symmetric, bool(dynamic) if dynamic != "local" else "local"


def _block(fields: ConfigFields) -> list[int] | None:
    value = fields.take("block_structure")
    if value is None:
        return None
    if isinstance(value, str):
        value = [int(part) if part.isdecimal() and len(part) < 10 else part for part in value.split("x")]
    if type(value) is not list or len(value) != 2 or any(type(n) is not int or not 0 < n < 10**9 for n in value):
        raise QsensError(f"{fields.at('block_structure')}: [rows, columns] is needed, found {as_text(value)}")
    return value


def _dtype(fields: ConfigFields, bits: int, kind: str, strategy: str, group: int | None, scale: str | None) -> str:
    if kind == "int":
        if not 1 <= bits <= 16:
            raise QsensError(f"{fields.at('num_bits')}: {bits} is not possible for integers, 1 to 16 are")
        return f"int{bits}"
    floats = {8: "fp8_e4m3", 6: "fp6_e2m3", 4: "fp4_e2m1"}
    if bits not in floats:
        raise QsensError(f"{fields.at('num_bits')}: there are floats of 4, 6 and 8 bits, not of {bits}")
    if strategy == "group" and group == 32 and scale is not None and scale.removeprefix("torch.") == "uint8":
        return f"mxfp{bits}"  # scales are powers of two, kept as their exponents
    if strategy == "tensor_group" and bits == 4 and group == 16:
        return "nvfp4"
    return floats[bits]
