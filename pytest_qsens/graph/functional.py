"""Products of activations that no module owns: attention, expert and other functional matmuls."""

from __future__ import annotations

import torch

from pytest_qsens.graph.narrow import LINEAR

aten = torch.ops.aten

_KINDS: dict[object, tuple[str, ...]] = {
    # attention's two products: queries with keys, then the probabilities with the values
    aten.scaled_dot_product_attention.default: ("qk", "pv"),
    aten.matmul.default: ("matmul",),
    aten.mm.default: ("matmul",),
    aten.bmm.default: ("matmul",),
    aten.baddbmm.default: ("matmul",),
    aten.addmm.default: ("matmul",),
    aten.mv.default: ("mv",),
    aten.addbmm.default: ("addbmm",),
    aten.einsum.default: ("einsum",),
    aten.linear.default: ("linear",),
    LINEAR: ("linear",),
    aten.conv1d.default: ("conv1d",),
    aten.conv2d.default: ("conv2d",),
    aten.conv3d.default: ("conv3d",),
    aten.conv_transpose1d.default: ("conv_transpose1d",),
    aten.conv_transpose2d.input: ("conv_transpose2d",),
    aten.conv_transpose3d.input: ("conv_transpose3d",),
    aten.lstm.input: ("lstm",),
    aten.lstm.data: ("lstm",),
    aten.gru.input: ("gru",),
    aten.gru.data: ("gru",),
    aten.rnn_tanh.input: ("rnn",),
    aten.rnn_tanh.data: ("rnn",),
    aten.rnn_relu.input: ("rnn",),
    aten.rnn_relu.data: ("rnn",),
}


def functional_kinds(target: object) -> tuple[str, ...]:
    """Kinds of the functional ops in one call of ``target``; empty if it multiplies nothing.

    Grouped expert products come as different operators in different transformers versions; they share their name.
    """
    return _KINDS.get(target) or (("grouped_mm",) if "grouped_mm" in str(target) else ())
