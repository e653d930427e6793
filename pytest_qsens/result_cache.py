"""Scores that were measured before, kept one by one as they are made. Knows nothing of torch or pytest.

A run key stands for all that the scores of a model depend on but the schemes of its ops; its entry in the cache
directory (`pytest_qsens.cache`) holds small files::

    results/<run key>/entry.json                        the model, and the hash of its unquantized outputs
    results/<run key>/<scheme key>.scheme.json          what a run under these schemes tells beside its scores
    results/<run key>/<op>.<mode>.<scheme key>.json     one score, of an op or of a group of ops

A score with only its op quantized depends on the op's own scheme, every other one on the schemes of all ops, and one of
an op that is quantized beside these (``added``) on both. What is read is believed only if it is whole, was written for
this very place, and comes from the unquantized outputs that ``entry.json`` names: where the model turns out to give
others, everything measured before is out of use at once.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from pytest_qsens import cache
from pytest_qsens.errors import QsensError
from pytest_qsens.files import write_atomically
from pytest_qsens.result_payloads import from_payload, to_payload

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from pytest_qsens.ops import Op
    from pytest_qsens.quant.schemes import Scheme
    from pytest_qsens.results import OpResult, Payload

SCHEMA = 1
KIND = "results"
SCHEME = ".scheme.json"

Part = Literal["isolated", "fallback", "added", "total"]
"""What is measured of an op, or of the whole model."""

_KEPT = frozenset({"measured", "unexercised", "unquantizable"})
"""A failure may have any reason, such as the memory of that day: it is tried again."""


def digest(value: object) -> str:
    """Hash of builtin values; 32 hexadecimal digits."""
    return hashlib.sha256(_text(value).encode()).hexdigest()[:32]


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)


class SchemeKeys:
    """Keys of the schemes that a score depends on.

    Args:
        schemes: Op → its scheme, or why it has none, for all ops of the model.
        base: The same when all that are to be quantized at once are, if that is not the same: an op that is quantized
            beside these has no scheme there.

    """

    def __init__(self, schemes: Mapping[str, Scheme | str], base: Mapping[str, Scheme | str] | None = None) -> None:
        base = schemes if base is None else base
        self._own, self._base = _digests(schemes), _digests(base)
        self._without = {op for op, scheme in base.items() if isinstance(scheme, str)}
        self.joint = digest(self._base)
        """Key of the schemes of all ops."""

    def key(self, op: str, part: Part, members: Sequence[str] = ()) -> str:
        """Key of what one score depends on; ``members`` are those of a group."""
        if part in ("fallback", "total"):
            return self.joint
        own = self._of_group(members) if members else self._own[op]
        return own if part == "isolated" else digest([self.joint, own])

    def _of_group(self, members: Sequence[str]) -> str:
        """Key of a group: what is only added counts where nothing else is in it (`Assignment.adds`)."""
        keys = self._own if self._without.issuperset(members) else self._base
        return digest({member: keys[member] for member in members})


def _digests(schemes: Mapping[str, Scheme | str]) -> dict[str, str]:
    known = {scheme: digest(scheme if isinstance(scheme, str) else asdict(scheme)) for scheme in set(schemes.values())}
    return {op: known[scheme] for op, scheme in schemes.items()}


class ResultCache:
    """The scores of one run key.

    Args:
        cache_dir: The cache.
        model: Label of the model, for those who look into the cache.
        facts: All that the scores depend on but schemes, in builtin values.
        schemes: The ops' schemes, as for `SchemeKeys`.
        base: As for `SchemeKeys`.

    Attributes:
        path: Directory of the entry.
        reference: Hash of the unquantized outputs that scores come from; ``None`` if nothing is known.
        problem: Why something could not be written, if something could not.

    """

    def __init__(
        self,
        cache_dir: Path,
        model: str,
        facts: Mapping[str, object],
        schemes: Mapping[str, Scheme | str],
        base: Mapping[str, Scheme | str] | None = None,
    ) -> None:
        self._key = digest([SCHEMA, facts])
        self._keys = SchemeKeys(schemes, base)
        self._model = model
        self.path = cache_dir / KIND / self._key
        self.problem: str | None = None
        about = self._read(cache.ABOUT)
        reference = None if about is None else about.get("reference")
        self.reference = reference if isinstance(reference, str) else None
        cache.touch(self.path)

    def trust(self, reference: str) -> bool:
        """Take the hash of the unquantized outputs of the model just loaded; what came from others is out of use.

        Returns:
            Whether it is the one of the scores that are here, if any are.

        """
        known, self.reference = self.reference, reference
        agrees = known in (None, reference)
        if not agrees:
            self._write(cache.ABOUT, {})
        return agrees

    def facts(self) -> Payload | None:
        """Return what a run under these schemes told beside its scores, as given to `keep_facts`."""
        found: Payload | None = self._believed(self._keys.joint + SCHEME, {})
        return found

    def keep_facts(self, scheme: str, facts: Payload) -> None:
        """Keep what this run tells beside its scores, unless it is there; ``scheme`` is a name for people."""
        known = self.facts()
        if known is None or any(known[name] != facts[name] for name in ("engine", "engine_reason")):
            self._write(self._keys.joint + SCHEME, {"scheme": scheme, "value": facts})

    def get(self, op: Op, part: Part) -> OpResult | None:
        """Score of an op, or of the whole model, measured before; ``None`` if there is none that can be believed."""
        place = self._place(op.name, op.member_names, part)
        payload = self._believed(self._file(place), place)
        if payload is None:
            return None
        try:
            result = from_payload(payload)
        except QsensError:
            return None
        scores = result.isolated if part == "total" else getattr(result, part)
        expected = (op.name, op.type, op.member_names)
        right = (result.op, result.type, result.ops) == expected and result.status in _KEPT
        return result if right and (scores is not None or result.status != "measured") else None

    def keep(self, result: OpResult, part: Part) -> None:
        """Keep a score, unless it is a failure."""
        place = self._place(result.op, result.ops, part)
        if result.status in _KEPT:
            self._write(self._file(place), {**place, "value": to_payload(result)})

    def _place(self, op: str, members: tuple[str, ...], part: Part) -> dict[str, str]:
        place = {"op": op, "part": part, "schemes": self._keys.key(op, part, members)}
        return {**place, "members": digest([op, *members])} if members else place

    @staticmethod
    def _file(place: Mapping[str, str]) -> str:
        return f"{place.get('members') or digest(place['op'])}.{place['part']}.{place['schemes']}.json"

    def _believed(self, name: str, place: Mapping[str, str]) -> Any:  # noqa: ANN401  # what was given to be kept
        """Value in a file, if it was written for this place and comes from the outputs that are known."""
        found = self._read(name)
        if found is None or self.reference is None:
            return None
        expected = {"reference": self.reference, **place}
        return found.get("value") if all(found.get(key) == value for key, value in expected.items()) else None

    def _read(self, name: str) -> dict[str, Any] | None:
        """Read a file of this run key; ``None`` if it is missing, damaged, or another one's."""
        try:
            sealed = json.loads((self.path / name).read_bytes())
            whole = sealed["sum"] == digest(sealed["content"])
            content = sealed["content"]
            return content if whole and content["run"] == self._key and content["name"] == name else None
        except (OSError, ValueError, TypeError, LookupError, RecursionError):
            return None

    def _write(self, name: str, content: Mapping[str, object]) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # Also where somebody has removed it meanwhile: without it the others would lie here for ever.
            about = self._read(cache.ABOUT)
            if about is None or about.get("reference") != self.reference:
                self._replace(cache.ABOUT, {})
            if name != cache.ABOUT:
                self._replace(name, content)
        except (QsensError, OSError) as error:
            reason = error.__cause__ if isinstance(error, QsensError) else error
            # Not which file: that would be another problem for every score.
            self.problem = f"{self.path.parent} cannot be written ({getattr(reason, 'strerror', None) or error})"

    def _replace(self, name: str, content: Mapping[str, object]) -> None:
        content = {**content, "run": self._key, "name": name, "reference": self.reference}
        sealed = {"by": cache.OWNER, "model": self._model, "sum": digest(content), "content": content}
        write_atomically(self.path / name, _text(sealed) + "\n")


def schemes_in(path: Path) -> list[str]:
    """Names of the schemes in an entry, for people."""
    found = set()
    for file in path.glob(f"*{SCHEME}"):
        try:
            found.add(str(json.loads(file.read_bytes())["content"]["scheme"]))
        except (OSError, ValueError, TypeError, LookupError, RecursionError):
            continue
    return sorted(found)


def count_scores(path: Path) -> int:
    """How many scores an entry holds."""
    return sum(1 for file in path.glob("*.*.*.json"))
