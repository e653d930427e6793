"""What is found out about a model once, before any op is scored; and how one process passes it on to others."""

from __future__ import annotations

import hashlib
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils._pytree import tree_leaves, tree_map

from pytest_qsens import profile
from pytest_qsens.artifact import Content
from pytest_qsens.engines.delta import Verdict
from pytest_qsens.engines.replay import captured_run, repeated_run
from pytest_qsens.errors import QsensError, told
from pytest_qsens.graph.capture import CaptureRefused, run_model
from pytest_qsens.graph.intercept import OpInterceptor, unchanged_state
from pytest_qsens.graph.serialize import NotSerializable, from_builtin, to_builtin
from pytest_qsens.graph.unlisted import AttentionWatch
from pytest_qsens.memory import trim
from pytest_qsens.metrics import energy
from pytest_qsens.quant.calibration import Calibration
from pytest_qsens.threads import one_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor, nn
    from torch.fx import Node

    from pytest_qsens.engines.replay import Captured
    from pytest_qsens.graph.calls import Call
    from pytest_qsens.graph.capture import Graph
    from pytest_qsens.graph.replay import Run
    from pytest_qsens.graph.schedule import Groups
    from pytest_qsens.models.spec import Batch, ModelSpec
    from pytest_qsens.quant.schemes import Schemes


@dataclass(frozen=True)
class Prepared:
    """What is known before any op is scored.

    Attributes:
        calibration: Ranges of activations.
        captured: The graph of every evaluation batch, and its run; ``None`` if none was wanted, or one was refused.
        refusal: Why it was refused.
        reference_seconds: Wall seconds of one unquantized forward of all evaluation batches.
        verdict: Whether differences are to be trusted, if another process has found that out.

    """

    calibration: Calibration
    captured: Sequence[Captured] | None
    refusal: str | None
    reference_seconds: float
    verdict: Verdict | None = None


def prepare(
    model: nn.Module,
    spec: ModelSpec,
    batches: Sequence[Batch],
    calibrating: Sequence[Batch],
    calibration: Calibration,
    memory: int | None,
) -> Prepared:
    """Run everything once: calibration, reference, capture.

    Args:
        model: On its device, in evaluation mode.
        spec: What else is known of it.
        batches: For evaluation, on the device.
        calibrating: Those for calibration.
        calibration: What observes them.
        memory: Bytes of values that are kept of every run of a graph; ``None`` if no graphs are wanted.

    Raises:
        QsensError: If the model cannot be run, or its reference output is not finite or all zero.

    """
    # ranges are to have the same bits on any number of threads
    with profile.phase("calibration"), one_thread() if calibration.ranges else nullcontext():
        observe_all(model, calibrating, spec, calibration)
    references = References(model, batches, spec)
    captured: list[Captured] | None = None
    refusal = None
    if memory is not None:
        try:
            with profile.phase("capture"), unchanged_state(model):
                # strict: it asks for a reference too many, which ends their checks
                pairs = zip(batches, references, strict=True)
                captured = [
                    captured_run(model, batch, spec.output, reference, memory, calibration.states)
                    for batch, reference in pairs
                ]
        except CaptureRefused as refused:
            refusal = f"capture refused: {refused}"
    if captured is None:
        references.finish()
    trim()  # a trace holds all values of the model for a while
    return Prepared(calibration, captured, refusal, references.seconds)


def taken_apart(
    prepared: Prepared, model: nn.Module, calibrating: Sequence[Batch], verdict: Verdict | None
) -> Content | None:
    """Collect what another process needs to know all of it; ``None`` if there is no graph, or one cannot be told."""
    if prepared.captured is None:
        return None
    tensors = dict(prepared.calibration.state())
    graphs = []
    for i, captured in enumerate(prepared.captured):
        try:
            graph, constants = to_builtin(captured.run.graph, model)
        except NotSerializable:
            return None
        graphs.append(graph)
        tensors |= {f"graph/{i}/{name}": value for name, value in constants.items()}
    facts = {
        "reached": sorted(prepared.calibration.reached),
        "refused": prepared.calibration.refused,
        "attending": prepared.calibration.attending,
        "per_token": prepared.calibration.per_token,
        "graphs": graphs,
        "groups": [_told_groups(captured.run) for captured in prepared.captured],
        "anywhere": [captured.anywhere for captured in prepared.captured],
        "references": [digest([captured.run.output]) for captured in prepared.captured],
        "calibrated_on": _contents(calibrating),
        "reference_seconds": prepared.reference_seconds,
        "verdict": None if verdict is None else verdict._asdict(),
    }
    return Content(facts, tensors)


def put_together(
    content: Content,
    model: nn.Module,
    batches: Sequence[Batch],
    calibrating: Sequence[Batch],
    schemes: Schemes,
    memory: int,
) -> Prepared | None:
    """Run the graphs of another process; ``None`` if data, outputs or model are not what it saw.

    Args:
        content: From `taken_apart`.
        model: On its device, in evaluation mode.
        batches: For evaluation, on the device.
        calibrating: For calibration, likewise.
        schemes: What the activations were observed for.
        memory: Bytes of values that are kept of every run.

    """
    facts, tensors = content.facts, content.tensors
    captured = []
    try:
        if facts["calibrated_on"] != _contents(calibrating):
            return None
        for i, (batch, told_graph) in enumerate(zip(batches, facts["graphs"], strict=True)):
            prefix = f"graph/{i}/"
            constants = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            graph = from_builtin(told_graph, constants, model, batch)
            with unchanged_state(model):
                groups = _groups(facts["groups"][i], graph)
                captured.append(repeated_run(graph, groups, memory, anywhere=facts["anywhere"][i]))
            if digest([captured[i].run.output]) != facts["references"][i]:
                return None
        calibration = Calibration.from_state(schemes, facts["reached"], facts["refused"], tensors, facts["per_token"])
        calibration.attending |= facts["attending"]
        verdict = None if facts["verdict"] is None else Verdict(**facts["verdict"])
    except (NotSerializable, LookupError, TypeError, ValueError, AttributeError, RuntimeError):
        return None
    return Prepared(calibration, captured, None, facts["reference_seconds"], verdict)


def _contents(batches: Sequence[Batch]) -> str:
    """Hash of the tensors in batches."""
    return digest(leaf for leaf in tree_leaves(list(map(dict, batches))) if isinstance(leaf, torch.Tensor))


def _told_groups(run: Run) -> list[list[int]]:
    """Positions of the nodes in each group."""
    every = dict.fromkeys(group for groups in run.groups.values() for group in groups)
    return [[run.order[node] for node in group] for group in every]


def _groups(told_groups: Iterable[Sequence[int]], graph: Graph) -> Groups:
    found: dict[Node, tuple[tuple[Node, ...], ...]] = {}
    for positions in told_groups:
        group = tuple(graph.nodes[position] for position in positions)
        for node in group:
            found[node] = (*found.get(node, ()), group)
    return found


def digest(outputs: Iterable[Tensor]) -> str:
    """Hash of the bits of outputs: equal for the same model and data on the same machine."""
    found = hashlib.sha256()
    for output in outputs:
        found.update(output.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def placed(batch: Batch, device: str) -> Batch:
    """Move a batch to the device, floating-point tensors in fp32."""

    def place(value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, torch.float32) if value.is_floating_point() else value.to(device)

    placed: Batch = tree_map(place, dict(batch))
    return placed


def observe_all(model: nn.Module, batches: Iterable[Batch], spec: ModelSpec, calibration: Calibration) -> None:
    """Run the model on all batches, as often as the calibration asks for, and let it see the calls of the ops."""

    def handler(op: str, call: Call, run: Callable[[], Tensor]) -> Tensor:
        output = run()
        calibration.observe(op, call, output)
        return output

    watch = AttentionWatch(model, calibration.states)
    for _ in calibration.passes():
        for number, batch in enumerate(batches, 1):
            with ExitStack() as entered:
                entered.enter_context(unchanged_state(model))
                if calibration.states and number == 1:
                    entered.enter_context(watch)
                entered.enter_context(OpInterceptor(model, handler, calibration.states))
                _run(model, batch, spec, f"calibration batch {number}")
    calibration.attending |= watch.found


class References:
    """Outputs of the unquantized model, batch by batch, checked as they come; no batch is run twice.

    Attributes:
        seconds: Wall seconds of the forwards so far.

    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], spec: ModelSpec) -> None:
        self.seconds = 0.0
        self._outputs = self._run(model, batches, spec)

    def __iter__(self) -> Iterator[Tensor]:
        return self._outputs

    def finish(self) -> None:
        """Check the batches that nobody has asked for."""
        for _ in self._outputs:
            pass

    def _run(self, model: nn.Module, batches: Sequence[Batch], spec: ModelSpec) -> Iterator[Tensor]:
        size = 0.0
        for number, batch in enumerate(batches, 1):
            where = f"evaluation batch {number}"
            start = time.perf_counter()
            with profile.phase("reference"), unchanged_state(model):
                reference = _run(model, batch, spec, where)
            self.seconds += time.perf_counter() - start
            if not bool(torch.isfinite(reference).all()):
                raise QsensError(
                    f"the reference output of {where} holds NaN or infinite values "
                    f"({_first_not_finite(model, batch, spec)}). Check the weights and the evaluation data."
                )
            size += energy(reference)
            yield reference
        if size == 0:
            raise QsensError("the reference output is zero everywhere, so no error can be related to it")


def _run(model: nn.Module, batch: Batch, spec: ModelSpec, where: str) -> Tensor:
    """Run the scored forward and check what it gives.

    Raises:
        QsensError: If the model or the spec's ``output`` raises, or gives something that cannot be scored.

    """
    try:
        scored: object = run_model(model, batch, spec.output)
    except QsensError:
        raise
    except Exception as error:
        raise QsensError(
            f"the model cannot be run on {where} (keys {', '.join(batch)}): {told(error)}. "
            "Check the batch, and the `output` function that picks what is scored."
        ) from error
    if not isinstance(scored, torch.Tensor):
        raise QsensError(f"`output` gives {type(scored).__name__} on {where}, not the tensor to score")
    if not scored.is_floating_point() or not scored.numel() or (spec.logits and not scored.dim()):
        raise QsensError(
            f"`output` gives {str(scored.dtype).removeprefix('torch.')} of shape {tuple(scored.shape)} on {where}: "
            "what is scored must be floating point and not empty, and logits need a dimension of classes"
        )
    return scored


def _first_not_finite(model: nn.Module, batch: Batch, spec: ModelSpec) -> str:
    found: list[str] = []

    def handler(op: str, call: Call, run: Callable[[], Tensor]) -> Tensor:
        output = run()
        if not bool(torch.isfinite(call.x).all()):
            found.append(f"already in the input of op {op}")
        elif not bool(torch.isfinite(output).all()):
            found.append(f"first in op {op}")
        return output

    with unchanged_state(model), OpInterceptor(model, handler):
        run_model(model, batch, spec.output)
    return found[0] if found else "in no op's output, so after the last op"
