"""Results of a run: per op, with a status."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_qsens.details import Details
    from pytest_qsens.profile import Profile
    from pytest_qsens.shards import Shard

Status = Literal["measured", "estimated", "unexercised", "unquantizable", "unquantized", "failed", "unrun"]
"""``unrun``: an op of the model that this run did not select or did not reach; ``unquantized``: one that the config
leaves as it is."""

Mode = Literal["isolated", "fallback", "added"]
"""Only the op is quantized; everything but the op; everything that a config quantizes, and the op."""

MODES: tuple[Mode, ...] = get_args(Mode)

IDENTICAL = "identical to the reference"
"""Reason of a measured op whose quantized output is the reference bit by bit."""

CANNOT = "measured, as it cannot be estimated: "
"""Reason of an op that was measured by an engine that estimates, before why."""

WITHOUT = "without "
"""Reason of a group that was measured without some of its members, before their names."""

LEFT_OUT = "not measured: "
"""Reason of an op that there was no time or need to measure, before why."""

ABOUT_SCORES = frozenset(
    {
        "additive",
        "distinguishable",
        "gain_noise",
        "inc_sse",
        "loss_noise",
        "noise",
        "quadratic",
        "samples",
        "stderr",
    }
)
"""What results hold beside metrics, and snapshots leave out."""

Scores = dict[str, float | None]
"""Metric name → value. ``sqnr_db`` is ``None`` when the output equals the reference (it would be infinite).

Beside its metrics, a mode has ``stderr`` and ``samples``: see `pytest_qsens.samples`. ``fallback`` has ``noise``,
``gain_noise`` and ``distinguishable``, a truth value: see `pytest_qsens.noise`; ``added`` the same with ``loss_noise``.
The whole model may have ``additive`` and ``quadratic``: see `pytest_qsens.interactions`.
"""

Interval = tuple[float, float]
"""Bounds that an estimated ``nmse`` comes with, the lower one first."""

LEVEL = 0.90
"""Share of ops whose exact value an interval is to hold."""

Payload = dict[str, Any]
"""Values of builtin types only: what a test report and JSON can carry."""


@dataclass(frozen=True)
class OpResult:
    """What is known about one op after a run.

    ``isolated``, ``fallback`` and ``added`` hold numbers only when ``status`` is ``measured`` or ``estimated``, or
    ``failed`` for another mode alone; ``intervals`` holds that of the ``nmse`` of every mode that is estimated.
    ``reason`` explains every status but ``measured``, and notes an output identical to the reference, what was left
    unquantized in a fully quantized model, or why an op was measured that would be estimated.
    """

    op: str
    type: str
    block: str
    status: Status
    reason: str | None = None
    isolated: Scores | None = None
    fallback: Scores | None = None
    seconds: float = 0.0
    intervals: Mapping[Mode, Interval] = field(default_factory=dict, hash=False)
    ops: tuple[str, ...] = ()
    """Of a group, the ops that were flipped together; empty for an op."""
    scheme: str | None = None
    """Name of its scheme, or of all schemes of a group or of the whole model, where a config is measured."""
    added: Scores | None = None
    weights: int | None = None
    """Values of its weight, or of those of all ops of a group; older files and products of activations have none."""
    kv_values: int | None = None
    """Of keys and values: how many values a cache stores of a token, of all heads; of a group, those of all its ops."""
    kv_heads: int | None = None
    """Likewise, in how many heads: what a token has a scale of its own for."""
    sketch: str | None = None
    """What it does to the output when it alone is quantized, see `pytest_qsens.interactions`; only if asked for."""

    @property
    def partial(self) -> bool:
        """Whether it is a group that was measured without some of its members."""
        return bool(self.ops) and any(part.startswith(WITHOUT) for part in (self.reason or "").split("; "))

    @property
    def modes(self) -> dict[Mode, Scores]:
        """The modes that were measured, with their scores."""
        return {mode: scores for mode in MODES if (scores := getattr(self, mode)) is not None}

    @property
    def metrics(self) -> dict[Mode, Scores]:
        """The modes with what can gate and be recorded, without what is only said about the scores."""
        return {
            mode: {name: value for name, value in scores.items() if name not in ABOUT_SCORES}
            for mode, scores in self.modes.items()
        }


@dataclass(frozen=True)
class Cost:
    """What a run took. ``forwards_per_op`` is the time of one op in units of ``reference_seconds``.

    Of merged shards, ``wall_seconds`` is that of the longest, and ``machine_seconds`` that of all together; other
    results have no ``machine_seconds``.
    """

    wall_seconds: float
    reference_seconds: float | None = None
    forwards_per_op: float | None = None
    machine_seconds: float | None = None


@dataclass(frozen=True)
class RunInfo:
    """What was run: enough to tell whether two results can be compared.

    ``mode`` is ``isolated``, ``fallback`` or ``both``; ``data`` a short hash of the batches, ``None`` if the model
    comes from a factory; ``engine_reason`` says why another engine than the usual one was used; ``profile`` is there if
    it was asked for, ``shard`` if only a part was measured. ``reference`` is a hash of the unquantized outputs' bits,
    where machines differ all of them, joined with ``+``; ``checkpoint`` is one of the weights' files, if there are any.
    ``cached`` is how many of the ops were measured by an earlier run and taken from the cache. ``granularity`` says
    what was measured as one, see `pytest_qsens.groups`. Where a config is measured, ``scheme`` is what it is called,
    and ``config`` has its ``path``, ``format`` and ``sha256``, and as ``down`` the scheme of ops that are added to it.
    """

    model: str
    scheme: str
    engine: str
    mode: str
    environment: Mapping[str, str]
    cost: Cost
    engine_reason: str | None = None
    data: str | None = None
    profile: Profile | None = None
    reference: str | None = None
    checkpoint: str | None = None
    shard: Shard | None = None
    cached: int = 0
    granularity: str = "op"
    config: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Interactions:
    """How what single ops do to the output meets: the matrix G of the products of their changes, in units of the NMSE.

    The sum over the rows and columns of a set of ops is the predicted NMSE of quantizing all of them at once.

    Attributes:
        ops: Names of rows and columns: all that were measured with a sketch.
        matrix: Symmetric. On the diagonal are the isolated errors, which are exact; products are those of sketches.

    """

    ops: tuple[str, ...]
    matrix: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class RunResult:
    """A result file: one entry per op of the model in model order, the whole model's, and how ops meet if asked for.

    ``details`` are there if a report was asked for.
    """

    run: RunInfo
    ops: tuple[OpResult, ...]
    total: OpResult | None = None
    interactions: Interactions | None = None
    details: Details | None = None


def joined(results: Sequence[OpResult]) -> OpResult:
    """Join the results of one op that were measured mode by mode."""
    if len(results) == 1:
        return results[0]
    failed = [result for result in results if result.status == "failed"]
    estimated = [result for result in results if result.status == "estimated"]
    told = [result.reason for result in failed or estimated or results]
    reasons = list(dict.fromkeys(reason for reason in told if reason not in (None, IDENTICAL)))
    if not reasons and all(reason == IDENTICAL for reason in told):
        reasons = [IDENTICAL]
    return replace(
        (failed or estimated or results)[0],
        reason="; ".join(reasons) or None,
        isolated=next((result.isolated for result in results if result.isolated is not None), None),
        fallback=next((result.fallback for result in results if result.fallback is not None), None),
        added=next((result.added for result in results if result.added is not None), None),
        seconds=sum(result.seconds for result in results),
        sketch=next((result.sketch for result in results if result.sketch is not None), None),
        intervals={mode: bounds for result in results for mode, bounds in result.intervals.items()},
    )


def lost_in_noise(scores: Scores | None) -> bool:
    """Whether the gain in these scores is known to be no more than noise."""
    return scores is not None and scores.get("distinguishable") is False


def round_score(value: float) -> float:
    """``value`` at the 6 significant digits that snapshots hold; never a negative zero."""
    return float(f"{value:.6g}") + 0.0
