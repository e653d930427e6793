"""Where the time of a run went, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_qsens.profile import Profile

LARGEST = 5
"""Kinds of ops that are named."""


def table(profile: Profile) -> Iterator[str]:
    """Lines with seconds and their share: phases, under ``replay`` its kinds, and the part in matrix products."""
    whole = sum(profile.seconds.values())
    processes = "" if profile.processes == 1 else f" of {profile.processes} processes together"
    yield f"where the time went from the first measurement to the last, in seconds{processes}"
    rows = [row for phase, seconds in profile.seconds.items() for row in _rows(profile, phase, seconds)]
    rows.append(("all", whole))
    if profile.gemm_seconds is not None:
        rows.append(("in matrix products", profile.gemm_seconds))
    width = max(len(name) for name, _ in rows)
    for name, seconds in rows:
        yield f"  {name:<{width}} {seconds:10.3f} {seconds / whole if whole else 0:7.1%}"
    if profile.gemm_seconds is None:
        yield "  in matrix products: unknown, as the engine runs the model itself"


def _rows(profile: Profile, phase: str, seconds: float) -> Iterator[tuple[str, float]]:
    yield phase, seconds
    if phase == "replay" and profile.replay:
        kinds = list(profile.replay.items())
        for kind, spent in kinds[:LARGEST]:
            yield f"  {kind}", spent
        if rest := kinds[LARGEST:]:
            yield f"  other ({len(rest)} kinds)", sum(spent for _, spent in rest)
        yield "  between the calls", max(0.0, seconds - sum(profile.replay.values()))
