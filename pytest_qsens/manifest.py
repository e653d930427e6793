"""The op list of a model, cached as a small file so that collecting tests needs neither torch nor weights."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from importlib.metadata import version
from typing import TYPE_CHECKING

from pytest_qsens.cache import MANIFESTS
from pytest_qsens.errors import QsensError
from pytest_qsens.files import write_atomically
from pytest_qsens.ops import TOTAL, Op
from pytest_qsens.result_cache import digest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pytest_qsens.models.source import ModelSource
    from pytest_qsens.module_tree import ModuleTree

SCHEMA = 5


def load_manifest(source: ModelSource, cache_dir: Path | None) -> tuple[Op, ...]:
    """Return the ops of a model in registration order: layers, and after those of a module what has no weights.

    That is its queries, keys and values, and its products.

    They are read from ``cache_dir`` if they were listed before, for the same model and the same versions of torch,
    transformers and this package; then torch is not imported. Without ``cache_dir``, or if the model cannot tell what
    it depends on, they are always listed anew.

    Raises:
        QsensError: If the model has no op that could be quantized, or one whose name is reserved.

    """
    fingerprint = source.fingerprint()
    if cache_dir is None or fingerprint is None:
        return _list(source)
    path = cache_dir / MANIFESTS / f"{_key(fingerprint)}.json"
    ops = _read(path)
    if ops is None:
        ops = _list(source)
        listed = [op.plain() for op in ops]
        content = {"schema": SCHEMA, "sum": digest(listed), "ops": listed}
        with suppress(OSError, QsensError):  # a cache that cannot be written only costs time
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(content))
    return ops


def load_tree(source: ModelSource) -> ModuleTree:
    """List all modules of a model, which few need: the module is built on the meta device each time."""
    from pytest_qsens.graph.tree import module_tree

    return module_tree(source.skeleton())


def _key(fingerprint: str) -> str:
    versions = [f"{package}={version(package)}" for package in ("torch", "transformers", "pytest-qsens")]
    return hashlib.sha256("\0".join([fingerprint, *versions]).encode()).hexdigest()[:32]


def _list(source: ModelSource) -> tuple[Op, ...]:
    from pytest_qsens.graph.attention import list_states
    from pytest_qsens.graph.modules import list_ops
    from pytest_qsens.graph.products import list_products

    model = source.skeleton()
    ops = list_ops(model)
    if not ops:
        raise QsensError(
            f"{source.label} has no op that could be quantized: no linear, convolution or embedding module."
        )
    if any(op.name == TOTAL for op in ops):
        raise QsensError(
            f"{source.label} has a module called {TOTAL!r}, a name reserved for the whole model. Rename the module."
        )
    return _in_order(ops, (*list_states(model), *list_products(model)))


def _in_order(layers: Sequence[Op], states: Sequence[Op]) -> tuple[Op, ...]:
    """Put keys and values, and products, after the last layer of their module, which computes them."""
    after: dict[int, list[Op]] = {}
    for state in states:
        module = state.name.rpartition(":")[0]
        places = [place for place, op in enumerate(layers) if not module or op.name.startswith(f"{module}.")]
        after.setdefault(max(places, default=len(layers) - 1), []).append(state)
    return tuple(op for place, layer in enumerate(layers) for op in (layer, *after.get(place, ())))


def _read(path: Path) -> tuple[Op, ...] | None:
    """Read a cached list; ``None`` if there is none or it is damaged."""
    try:
        content = json.loads(path.read_bytes())
        whole = content["sum"] == digest(content["ops"])
        return tuple(map(Op.from_plain, content["ops"])) if whole and content["schema"] == SCHEMA else None
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None
