"""What is known of a model's scores in one process: measured here, or by an earlier run. Knows nothing of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_qsens.collection.plan import Wanted
    from pytest_qsens.ops import Op
    from pytest_qsens.result_cache import Part, ResultCache
    from pytest_qsens.results import OpResult, Payload


class Look(NamedTuple):
    """What model and data look like, which must not change while they are loaded."""

    identity: str
    data: str | None


@dataclass(frozen=True)
class Measured:
    """What is known of an op, and the seconds that this took; ``None`` if all of it was measured by an earlier run."""

    result: OpResult
    spent: float | None


class KnownScores:
    """What is known under one `RunSpec`: measured in this process, or by an earlier run.

    Args:
        wanted: What the collected tests need.
        look: Tells what model and data look like now; ``None`` if nothing is to be cached, or they cannot tell.
        open_cache: Finds the scores of earlier runs of a model and data that look so.

    """

    def __init__(
        self,
        wanted: Wanted,
        look: Callable[[], Look | None],
        open_cache: Callable[[Look], ResultCache],
    ) -> None:
        self._wanted = wanted
        self._look = look
        self._open_cache = open_cache
        self.seen = look()
        """What they looked like last."""
        self._found: dict[tuple[Op, Part], Measured] = {}
        self.cache = None if self.seen is None else open_cache(self.seen)
        self.facts = None if self.cache is None else self.cache.facts()
        """What the cache tells beside scores."""
        # Without a word from the cache there is nothing that has to be of the model to be loaded.
        self.sure = self.cache is None or (self.facts is not None and not self.missing() and not wanted.model)
        """Whether what the cache says needs no look at the model."""

    def missing(self) -> set[Op]:
        """Tell the wanted ops and groups with a score that has to be measured."""
        return {op for op, parts in self._wanted.parts.items() if any(self.get(op, part) is None for part in parts)}

    def get(self, op: Op, part: Part) -> Measured | None:
        """Score that is known."""
        if (op, part) not in self._found and self.cache is not None:
            result = self.cache.get(op, part)
            if result is not None:
                self._found[op, part] = Measured(result, None)
        return self._found.get((op, part))

    def add(self, op: Op, part: Part, result: OpResult, facts: Payload, scheme: str) -> Measured:
        """Take a score just measured, and keep it for later runs."""
        if self.cache is not None:
            self.cache.keep_facts(scheme, facts)
            self.cache.keep(result, part)
        self._found[op, part] = Measured(result, 0.0)  # another test that asks for it takes no time
        return Measured(result, result.seconds)

    def loaded(self, reference: str) -> str | None:
        """Take the hash of the outputs of the model just loaded; what the cache says of another one is forgotten.

        Returns:
            What has to be told about that.

        """
        self.sure, self.facts = True, None
        before, self.seen = self.seen, self._look()
        told = None
        if before is None and self.seen is not None:  # a model that has just been downloaded
            self.cache = self._open_cache(self.seen)
        elif before != self.seen:
            self.cache = None
            told = "model or data have changed since the run began: no score of this run is kept in the cache"
        if self.cache is not None and not self.cache.trust(reference):
            told = (
                "the unquantized outputs are not those of the cached scores, although the model's files look the same: "
                "all is measured anew. --qsens-hash-weights knows weights by their contents"
            )
        if told is not None:
            self._found = {key: known for key, known in self._found.items() if known.spent is not None}
        return told
