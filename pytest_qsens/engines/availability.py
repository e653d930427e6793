"""Whether an engine can be used at all, found out before anything is loaded."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING

from pytest_qsens.errors import QsensError
from pytest_qsens.ops import PRODUCTS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from pytest_qsens.ops import Op

KERNEL_ENGINES = ("fx", "inc")

SCHEME = "w8a8"
"""What torch's kernels, and so Intel Neural Compressor's strategy, execute."""

_WITHOUT = "without --qsens-time-budget, --qsens-top and --qsens-representatives, which begin with estimates"

_PACKAGE = "neural-compressor"
_INSTALL = "Install what it needs with: pip install 'pytest-qsens[inc]'"


def check_engine(engine: str, scheme: str, device: str) -> None:
    """Check what an engine needs.

    Raises:
        QsensError: If the scheme or the device is not one that the engine can measure, or a package is missing.

    """
    if engine not in KERNEL_ENGINES:
        return
    if scheme != SCHEME:
        raise QsensError(
            f"engine {engine} measures scheme {SCHEME} only, not {scheme!r}: there are no other kernels, and their "
            "scales are found by torch's histogram. Measure it with engine delta, the default"
        )
    if not device.startswith("cpu"):
        raise QsensError(f"engine {engine} runs int8 kernels of the CPU, not of device {device!r}")
    if engine == "inc":
        _check_inc()


def check_added(engine: str, added: Collection[str]) -> None:
    """Check that an engine can measure ops that are quantized beside all others, if there are any.

    Raises:
        QsensError: If it cannot.

    """
    if added and engine == "probe":
        raise QsensError(
            f"engine {engine} estimates what quantizing an op does by itself, or restoring it, and not what it adds to "
            f"a config, which is asked for {len(added)} ops. Measure them with engine delta, the default ({_WITHOUT})"
        )


def check_products(engine: str, ops: Iterable[Op]) -> None:
    """Check that an engine can measure products of two activations, if some of the ops are.

    Raises:
        QsensError: If it cannot.

    """
    products = [op.name for op in ops if op.type in PRODUCTS]
    if products and engine == "probe":
        raise QsensError(
            f"engine {engine} estimates what rounding one input does, and {products[0]} has two that are rounded. "
            f"Measure products with engine delta, the default ({_WITHOUT})"
        )


def check_group(engine: str, op: Op) -> None:
    """Check that an engine can measure a group of ops, if ``op`` is one.

    Raises:
        QsensError: If it cannot.

    """
    whys = {
        "probe": "estimates the errors of single ops, and those of a group add up in ways that it does not see",
        "inc": "drives Intel Neural Compressor's strategy, which scores single ops",
    }
    if op.members and engine in whys:
        without = f" ({_WITHOUT})" if engine == "probe" else ""
        raise QsensError(
            f"engine {engine} {whys[engine]}: {op} is a group of {len(op.members)}. Measure groups with engine delta, "
            f"the default{without}, or single ops with --qsens-granularity op"
        )


def _check_inc() -> None:
    from packaging.version import Version

    try:
        found = Version(version(_PACKAGE))
    except PackageNotFoundError:
        raise QsensError(
            f"engine inc needs Intel Neural Compressor with its MSE_V2 strategy ({_PACKAGE} 2.6 to 3.7.x; 3.8 removed "
            f"it), which is not installed. {_INSTALL}"
        ) from None
    if not Version("2.6") <= found < Version("3.8.dev0"):
        why = "which has no MSE_V2 strategy any more" if found >= Version("3.8.dev0") else "which is too old"
        raise QsensError(f"engine inc needs {_PACKAGE} 2.6 to 3.7.x, not {found}, {why}. {_INSTALL}")
    # what it imports without declaring it
    missing = [name for name in ("six", "pkg_resources") if find_spec(name) is None]
    if missing:
        raise QsensError(f"engine inc: {_PACKAGE} {found} imports {' and '.join(missing)}, not installed. {_INSTALL}")
    if Version(version("numpy")) >= Version("2"):
        raise QsensError(f"engine inc: {_PACKAGE} {found} needs numpy<2, not {version('numpy')}. {_INSTALL}")
