"""A model as collection knows it: its ops, groups of them, and how each is quantized. No weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qsens.errors import QsensError
from pytest_qsens.groups import grouped
from pytest_qsens.quant.assignment import Assigned, Assignment
from pytest_qsens.quant.schemes import scheme_named

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_qsens.groups import Fused
    from pytest_qsens.models.source import ModelSource
    from pytest_qsens.ops import Op
    from pytest_qsens.options import Options, RunSpec


_MISSING = {
    "keys and values": "keys and values of attention, and {} has no module that takes a cache and calls transformers' "
    "attention interface or torch's scaled_dot_product_attention. If it multiplies queries, keys and values by hand, "
    "call torch.nn.functional.scaled_dot_product_attention instead; for its layers, choose another scheme, such as "
    "w8a8",
    "products": "products of two activations, and {} has no module that attends or whose forward names "
    "matmul, bmm, mm or baddbmm, or uses @. For its layers, choose another scheme, as w8a8",
}
"""What a scheme is of → what it quantizes, and that a model has none."""


@dataclass(frozen=True, eq=False)
class Model:
    """A model as collection knows it, to be quantized in one way.

    Attributes:
        source: Where it comes from.
        ops: Its layers; its keys and values, and products, where something is said of these; where only of these, they
            alone.
        assigned: How each op is quantized.

    """

    source: ModelSource
    ops: tuple[Op, ...]
    assigned: Assigned
    _units: dict[tuple[str, tuple[Fused, ...]], tuple[Op, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, source: ModelSource, ops: Sequence[Op], spec: RunSpec) -> Model:
        """Tell how the ops of a model are quantized; a config is read once.

        Args:
            source: The model.
            ops: Of its manifest.
            spec: With the scheme or the config.

        Raises:
            QsensError: If the config cannot be used, or the scheme is of what the model has not.

        """
        if spec.config is not None:
            from pytest_qsens.configs.gate import assign
            from pytest_qsens.manifest import load_tree

            assigned = assign(spec.config, ops, partial(load_tree, source))
            return cls(source, tuple(op for op in ops if op.name in assigned.assignment.names), assigned)
        scheme = scheme_named(spec.scheme, "scheme")
        meant = tuple(op for op in ops if scheme.means(op.type))
        if not meant:
            what = "keys and values" if scheme.parts.products is None else "products"
            raise QsensError(f"scheme {spec.scheme!r} quantizes {_MISSING[what].format(source.label)}")
        return cls(source, meant, Assigned(Assignment.uniform(scheme, meant)))

    def units(self, options: Options) -> tuple[Op, ...]:
        """List what is measured as one: the ops, or groups of them.

        Raises:
            QsensError: If two would have one name.

        """
        key = options.granularity, options.fused
        if key not in self._units:
            self._units[key] = grouped(self.ops, *key)
        return self._units[key]

    def measurable(self, options: Options) -> tuple[Op, ...]:
        """List what is measured as one, but for what a config leaves unquantized."""
        assignment = self.assigned.assignment
        return tuple(unit for unit in self.units(options) if assignment.measures(unit))

    @property
    def label(self) -> str:
        """Name in node ids and snapshot paths."""
        return self.source.label

    @property
    def config_hashes(self) -> dict[str, str]:
        """Name of the config that was read, if one was → hash of the file."""
        about = self.assigned.about
        return {} if about is None else {Path(about["path"]).name: about["sha256"]}

    @cached_property
    def evaluation(self) -> str | None:
        """Hash of the evaluation data, as it was when first asked for."""
        return self.source.evaluation_fingerprint()
