"""Where the time of a run goes: by phase, in replays by kind of op, and how much of it in matrix products.

Nothing is timed unless a profiler runs; what is timed then asks `current`, or is put into a `phase`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import ContextDecorator, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, get_args

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch.fx import Node

T = TypeVar("T")

Phase = Literal[
    "load", "calibration", "reference", "capture", "local quantization", "replay", "forward", "scoring", "waiting"
]
"""``forward`` is what engines without a graph do in place of ``replay``; ``waiting`` is what is none of the others."""

PHASES: tuple[Phase, ...] = get_args(Phase)

PRODUCTS = frozenset(
    {
        *("linear", "addmm", "mm", "bmm", "baddbmm", "addbmm", "addmv", "mv", "matmul", "einsum"),
        *("convolution", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        "scaled_dot_product_attention",
    }
)
"""Kinds of ops that multiply matrices, beside grouped products, whose names differ between versions."""

_COUNTED: frozenset[Phase] = frozenset({"local quantization", "replay", "scoring"})
"""Phases whose products count. Those before them run the model itself, where nobody knows."""


@dataclass(frozen=True)
class Profile:
    """Where the time of processes went, each from the start of its first measurement to the end of its last.

    Attributes:
        processes: How many.
        seconds: Phase → seconds of all processes together; what a phase holds of another counts there alone.
        replay: Kind of op → seconds of its calls in replays, the longest first. What ``seconds`` has more is between
            the calls.
        gemm_seconds: Seconds in matrix products of replays, local quantization and scoring; ``None`` where an engine
            ran the model itself, and nobody knows.

    """

    processes: int
    seconds: Mapping[str, float]
    replay: Mapping[str, float]
    gemm_seconds: float | None


class _Place(NamedTuple):
    """What a piece of time counts for."""

    phase: Phase
    kind: str | None = None
    product: bool = False


class Profiler:
    """Gives every moment, from the first entry to the last exit, to the place entered last and not yet left.

    Args:
        clock: Seconds from some moment.

    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[_Place, float] = defaultdict(float)
        self._entered = [_Place("waiting")]
        self.last: float | None = None
        """When a place was entered or left last."""

    def enter(self, phase: Phase | None, kind: str | None = None, *, product: bool = False) -> None:
        """Enter a phase, or a call in the present one."""
        self._take_time()
        self._entered.append(_Place(phase or self._entered[-1].phase, kind, product))

    def leave(self) -> None:
        """Go back to where the last `enter` came from."""
        self._take_time()
        self._entered.pop()

    def call(
        self,
        node: Node,
        function: Callable[..., T],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        linear: bool = False,
    ) -> T:
        """Time what is called for a node of a graph.

        Args:
            node: Of a `pytest_qsens.graph.capture.Graph`.
            function: Computes its value. In place of the node's own operator it is no product.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            linear: Whether it multiplies what the node's operator would, in another shape.

        """
        product = (linear or function is node.target) and is_product(node)
        self.enter(None, kind_of(node), product=product)
        try:
            return function(*args, **kwargs)
        finally:
            self.leave()

    def within(self, kind: str, function: Callable[..., T], *args: object) -> T:
        """Time as a kind of its own what is around the calls in a function."""
        self.enter(None, kind)
        try:
            return function(*args)
        finally:
            self.leave()

    def profile(self) -> Profile:
        """Sum up this process."""
        reached = {place.phase for place in self._seconds} | {"waiting"}
        seconds: dict[str, float] = {name: 0.0 for name in PHASES if name in reached}
        kinds: dict[str, float] = defaultdict(float)
        gemm = 0.0
        for place, spent in self._seconds.items():
            seconds[place.phase] += spent
            if place.kind is not None and place.phase == "replay":
                kinds[place.kind] += spent
            if place.product and place.phase in _COUNTED:
                gemm += spent
        return Profile(1, seconds, _longest_first(kinds), None if "forward" in seconds else gemm)

    def _take_time(self) -> None:
        now = self._clock()
        if self.last is not None:
            self._seconds[self._entered[-1]] += now - self.last
        self.last = now


current: Profiler | None = None
"""The profiler that runs in this process."""


def call(
    node: Node,
    function: Callable[..., T],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    linear: bool = False,
) -> T:
    """Call a function for a node of a graph, as `Profiler.call` does if a profiler runs."""
    if current is None:
        return function(*args, **kwargs)
    return current.call(node, function, args, kwargs, linear=linear)


@contextmanager
def running(profiler: Profiler | None) -> Iterator[None]:
    """Let a profiler run, or none."""
    global current  # noqa: PLW0603 - what is timed is too deep, and runs too often, to be handed a profiler
    outer, current = current, profiler
    try:
        yield
    finally:
        current = outer


class _PhaseContext(ContextDecorator):
    def __init__(self, name: Phase, *, product: bool) -> None:
        self._name = name
        self._product = product

    def __enter__(self) -> None:
        if current is not None:
            current.enter(self._name, product=self._product)

    def __exit__(self, *_: object) -> None:
        if current is not None:
            current.leave()


def phase(name: Phase, *, product: bool = False) -> _PhaseContext:
    """Count the time of a ``with`` block or of a decorated function, which must be no generator, for a phase.

    Args:
        name: The phase.
        product: Whether it is a product of matrices.

    """
    return _PhaseContext(name, product=product)


def kind_of(node: Node) -> str:
    """Name of a node's operator without namespace and overload; a replay clones what is no call."""
    if node.op != "call_function":
        return "clone"
    name: str = getattr(node.target, "__name__", str(node.target))
    return name.partition(".")[0]


def is_product(node: Node) -> bool:
    """Whether a node's operator multiplies matrices."""
    name = kind_of(node)
    return name in PRODUCTS or "grouped_mm" in name


def total(profiles: Iterable[Profile]) -> Profile:
    """Add up the profiles of several processes."""
    found = list(profiles)
    phases = {name for profile in found for name in profile.seconds}
    kinds = {name for profile in found for name in profile.replay}
    products = [profile.gemm_seconds for profile in found]
    return Profile(
        sum(profile.processes for profile in found),
        {name: sum(profile.seconds.get(name, 0.0) for profile in found) for name in PHASES if name in phases},
        _longest_first({name: sum(profile.replay.get(name, 0.0) for profile in found) for name in kinds}),
        None if None in products else sum(spent for spent in products if spent is not None),
    )


def _longest_first(kinds: Mapping[str, float]) -> dict[str, float]:
    return {name: kinds[name] for name in sorted(kinds, key=lambda name: (-kinds[name], name))}
