"""Tables and sentences from what benchmarks/performance.py measured."""

from __future__ import annotations

import statistics
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

Found = dict[str, Any]

SUBJECTS = ("text", "minilm", "resnet-18", "resnet-50")
GIB = 2**30


class Cost:
    """What a run costs, the median over its rounds.

    Args:
        rounds: ``unit`` (seconds of a forward), ``setup`` and ``per_op`` (seconds) of each.
        ops: How many ops share the set-up.

    Attributes:
        unit: Seconds of one forward.
        setup: Forwards before the first op.
        per_op: Forwards for each op, after that.
        whole: Forwards for each op, with its share of the set-up.

    """

    def __init__(self, rounds: Sequence[Found], ops: int) -> None:
        self.unit = statistics.median(found["unit"] for found in rounds)
        self.setup = statistics.median(found.get("setup", 0.0) / found["unit"] for found in rounds)
        self.per_op = statistics.median(found["per_op"] / found["unit"] for found in rounds)
        self.whole = statistics.median(
            (found.get("setup", 0.0) / ops + found["per_op"]) / found["unit"] for found in rounds
        )


def page(template: str, results: Found) -> str:
    """Fill in the page."""
    return template.format(**tables(results))


def printed(template: str, results: Found) -> str:
    """Headings, tables and findings of the page, for a terminal."""
    found: list[list[str]] = [[f"On {machine(results)} The unit is one fp32 forward."]]
    for line in page(template, results).splitlines():
        if line.startswith("#"):
            found.append(["", line.lstrip("# ")])
        elif line.startswith(("|", "- ")):
            found[-1].append(line)
        elif line and found[-1][-1].startswith("|"):
            found[-1].append("")  # between two tables
    return "\n".join(line for part in found if len(part) != 2 for line in aligned(part))


def aligned(lines: Sequence[str]) -> Iterator[str]:
    """Pad the cells of tables to the width of their columns."""
    for is_table, group in groupby(lines, lambda line: line.startswith("|")):
        if not is_table:
            yield from group
            continue
        table = [[cell.strip() for cell in line.strip("|").split("|")] for line in group]
        widths = [max(len(cell) for cell in column if set(cell) != {"-"}) for column in zip(*table, strict=True)]
        for row in table:
            rule = set("".join(row)) == {"-"}
            cells = ["-" * width if rule else cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            yield "  ".join(cells).rstrip()


def tables(results: Found) -> dict[str, str]:
    """All parts of the page by name."""
    return {
        "machine": machine(results),
        "isolated": rows(SUBJECTS, results, isolated, "| {} |" + " {} |" * 8),
        "fallback": rows(SUBJECTS, results, fallback, "| {} |" + " {} |" * 7),
        "inc": inc(results),
        "depth": attempt(lambda: depth(results["depth"], peak_rate(results)), results, "depth", "rates", shape=row(7)),
        "cost_model": attempt(lambda: cost_model(results), results, "depth", "rates", shape="- {}"),
        "rates": attempt(lambda: rates(results["rates"]), results, "rates", shape=row(4)),
        "shares": attempt(lambda: shares(results["profile"]), results, "profile", shape=row(7)),
        "lengths": rows(named(results, "length-", "batches-"), results, length, "| {} |" + " {} |" * 9),
        "linear": linear(results),
        "agreement": agreement(results),
        "failures": failures(results),
    }


def machine(results: Found) -> str:
    """Name the machine and how much was measured."""
    found, options = results["machine"], results["options"]
    versions = [results[name]["version"] for name in named(results, "inc-") if "version" in results[name]]
    version = f", neural-compressor {versions[0]}" if versions else ""
    quick = " A quick run, of reduced sizes: nothing to quote." if options["quick"] else ""
    return (
        f"{found['cpu']} ({found['vendor']}, family/model {found['family']}, {found['capability']}, bf16 products "
        f"{'yes' if found['bf16'] else 'no'}, AMX {'yes' if found['amx'] else 'no'}), {found['threads']} threads, "
        f"torch {found['torch']}, transformers {found['transformers']}, Python {found['python']}{version}; "
        f"{options['repeats']} rounds, {options['few']} ops where a few stand for all.{quick}"
    )


def attempt(make: Callable[[], str], results: Found, *names: str, shape: str) -> str:
    """Make rows or sentences, or one that says that a section they need is missing."""
    try:
        return make()
    except (KeyError, IndexError, statistics.StatisticsError) as error:
        lacking = [missing(results, name) for name in names if "failed" in results.get(name, {"failed": ""})]
        return shape.format("; ".join(lacking) or f"not measured ({error})")


def row(columns: int) -> str:
    """Return the shape of a row with one cell filled."""
    return "| {} |" + " |" * (columns - 1)


def missing(results: Found, name: str) -> str:
    """Say why there is nothing from a section."""
    return f"{name}: not measured ({results.get(name, {}).get('failed', 'left out')})"


def rows(names: Iterable[str], results: Found, row: Callable[..., Sequence[str]], shape: str) -> str:
    """One row for each section that ran; one that failed says so in its place."""

    def line(name: str) -> str:
        try:
            return shape.format(*row(results[name], results))
        except (KeyError, IndexError, statistics.StatisticsError):
            return shape.format(missing(results, name), *[""] * (shape.count("{}") - 1))

    return "\n".join(line(name) for name in names if name in results)


def named(results: Found, *starts: str) -> list[str]:
    """Sections whose names start so."""
    return [name for name in results if name.startswith(starts)]


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def costs(found: Found, kind: str) -> Cost:
    """Cost of one kind of run of a section."""
    return Cost([part[kind] for part in found["rounds"] if kind in part], found["ops"])


def isolated(found: Found, results: Found) -> Sequence[str]:
    """Mode isolated against the naive loop."""
    ours, naive = costs(found, "isolated"), costs(found, "naive")
    try:
        bound = number(average_bound(found, ours.unit, results))
    except KeyError:
        bound = "?"
    return (
        found["title"],
        str(found["ops"]),
        f"{ours.unit * 1e3:.3g} ms",
        number(ours.setup),
        number(ours.per_op),
        number(ours.whole),
        bound,
        number(naive.whole),
        number(naive.whole / ours.whole),
    )


def fallback(found: Found, _: Found) -> Sequence[str]:
    """Mode fallback against the naive loop."""
    ours, noisy, naive = (costs(found, kind) for kind in ("fallback", "fallback_noise", "naive_fallback"))
    return (
        found["title"],
        number(ours.setup),
        number(ours.per_op),
        number(ours.whole),
        number(noisy.per_op),
        number(noisy.whole),
        number(naive.whole),
        number(naive.whole / ours.whole),
    )


def peak_rate(results: Found, *, narrow: bool = True) -> float:
    """FLOPs per second that products reach here at best: in bf16 if the weights are and it is faster."""
    shapes = results["rates"]["shapes"]
    return max(float(shape[kind]) for shape in shapes for kind in (("fp32", "bf16") if narrow else ("fp32",)))


def average_bound(found: Found, unit: float, results: Found) -> float:
    """Find how many forwards the products downstream of an op take at the least, on average, without logits."""
    rate = peak_rate(results, narrow=found["narrow"])
    body = statistics.fmean(after for after, _ in found["flops"]["after"].values())
    return float(body * found["flops"]["forward"] / rate / unit)


def inc(results: Found) -> str:
    """Intel Neural Compressor against both modes here."""
    columns = (
        "model and data",
        "forward",
        "INC, per op",
        "INC, per op",
        "`fx`, per op",
        "INC / `fx`",
        "`fallback`, per op",
        "INC / `fallback`",
        "`isolated`, per op",
        "INC / `isolated`",
    )
    shape = "| {} |" + " {} |" * (len(columns) - 1)
    found = rows(named(results, "inc-"), results, inc_row, shape)
    if not found:
        return f"- {results.get('missing') or 'Not measured.'}"
    return "\n".join([shape.format(*columns), "|" + "---|" * len(columns), found])


def inc_row(found: Found, results: Found) -> Sequence[str]:
    """One length."""
    theirs = Cost([found["inc"]], found["ops"])
    texts = [found["title"], f"{theirs.unit * 1e3:.3g} ms", f"{found['inc']['per_op']:.3g} s", number(theirs.per_op)]
    for kind in ("fx", "auto"):
        if kind in found:
            ours = Cost([found[kind]], found["ops"])
            texts += [number(ours.whole), number(theirs.per_op / ours.whole)]
        else:
            texts += [f"not measured ({found.get('failed', 'left out')})", ""]
    same = results.get(f"length-{found['tokens']}", {})
    if "isolated" in same:
        ours = Cost([same["isolated"]], same["ops"])
        return [*texts, number(ours.whole), number(theirs.per_op / ours.whole)]
    return [*texts, "not measured", ""]


def depth(found: Found, rate: float) -> str:
    """Measured cost next to the bound, block by block."""
    lines = []
    for block, wave in found["waves"].items():
        cost = Cost(wave["timed"], wave["ops"])
        unit = rate * cost.unit / found["flops"]["forward"]  # forwards at the peak in the time of one
        bound, with_head = wave["body"] / unit, (wave["body"] + wave["head"]) / unit
        apart = number(cost.per_op / bound) if bound else "no products"
        lines.append(
            f"| `{block}` | {wave['ops']} | {wave['body']:.3f} | {number(cost.per_op)} | {number(bound)} | {apart} | "
            f"{number(with_head)} |"
        )
    return "\n".join(lines)


def cost_model(results: Found) -> str:
    """Fit the measured blocks, and say what makes up a whole run."""
    found = results["depth"]
    rate, flops = peak_rate(results), found["flops"]
    waves = [wave for wave in found["waves"].values() if wave["ops"] > 1]
    timed = [Cost(wave["timed"], wave["ops"]) for wave in waves]
    slope, constant = statistics.linear_regression([wave["body"] for wave in waves], [cost.per_op for cost in timed])
    unit = statistics.median(cost.unit for cost in timed)
    least = flops["forward"] / rate / unit
    measured = statistics.fmean(cost.per_op for cost in timed)
    bound = least * statistics.fmean(wave["body"] for wave in waves)
    lines = [
        f"h = {flops['head']:.3f}: the head's share of a forward's {flops['forward'] / 1e9:.3g} GFLOP.",
        f"s = {least:.3f}: {flops['forward'] / unit / 1e9:.0f} GFLOP/s in an fp32 forward, {rate / 1e9:.0f} at best.",
        f"Fitted to the blocks above: a = {constant:.3f}, b = {slope:.3f}.",
        f"Without the set-up an op of these costs {measured:.3f} forwards, {measured / bound:.2f} times the bound.",
        f"On the way downstream alone it is b / s = {slope / least:.2f} times the bound.",
    ]
    if "text" in results:
        lines += whole_model(results["text"], constant, slope, results)
    return "\n".join(f"- {line}" for line in lines)


def whole_model(found: Found, constant: float, slope: float, results: Found) -> list[str]:
    """Say what the fit makes of a run of all ops."""
    if "rounds" not in found:
        return [missing(results, "text")]
    cost = costs(found, "isolated")
    body = statistics.fmean(after for after, _ in found["flops"]["after"].values())
    setup, bound = cost.setup / found["ops"], average_bound(found, cost.unit, results)
    lines = [
        f"The whole run takes {cost.whole:.3f} forwards per op: {cost.whole / bound:.2f} times the bound, {bound:.3f}.",
        f"The set-up is {setup:.3f} of these; by the fit a = {constant:.3f}, b·D = {slope * body:.3f}.",
    ]
    if "divergence" in found:
        logits = Cost([found["divergence"]], found["ops"]).per_op
        lines.append(
            f"With logits made, for `kl` and `top1`, ops a third and two thirds down cost {logits:.3f} forwards."
        )
    return lines


def rates(found: Found) -> str:
    """List what products run at."""
    return "\n".join(
        f"| {s['rows']} x {s['in']} x {s['out']} | "
        + " | ".join(f"{s[k] / 1e9:.0f}" for k in ("fp32", "bf16", "int8"))
        + " |"
        for s in found["shapes"]
    )


def shares(found: Found) -> str:
    """Where the time goes."""
    lines = []
    for part, timed in found.items():
        if isinstance(timed, dict) and "shares" in timed:
            texts = [f"{share:.0%}" for share in timed["shares"].values()]
            largest = ", ".join(
                f"{name.removeprefix('aten::')} {share:.0%}" for name, share in timed["largest"].items()
            )
            lines.append(f"| {part} | {timed['wall']:.2f} s | {' | '.join(texts)} | {largest} |")
    if "failed" in found or not lines:
        lines.append(row(7).format(missing({"profile": found}, "profile")))
    return "\n".join(lines)


def length(found: Found, _: Found) -> Sequence[str]:
    """One amount of data."""
    run = found["isolated"]
    cost = Cost([run], found["ops"])
    seconds = cost.whole * cost.unit
    amount = found["tokens"] * found["batches"] / 1000
    return (
        f"{found['batches']} x {found['tokens']}",
        str(found["layers"]),
        f"{cost.unit:.3g} s",
        number(cost.setup),
        number(cost.per_op),
        number(cost.whole),
        f"{seconds:.3g} s",
        f"{seconds / amount:.3g} s",
        f"{found['model_bytes'] / GIB:.2f} GiB",
        f"{run['memory']['peak'] / GIB:.2f} GiB",
    )


def linear(results: Found) -> str:
    """Say what four batches cost against one."""
    one, four = results.get("length-64", {}), results.get("batches-4", {})
    if "isolated" not in one or "isolated" not in four:
        return "One batch against four: not measured."
    times = [Cost([found["isolated"]], found["ops"]) for found in (one, four)]
    seconds = [cost.whole * cost.unit for cost in times]
    memory = [found["isolated"]["memory"]["peak"] / GIB for found in (one, four)]
    return (
        f"Four batches take {seconds[1] / seconds[0]:.2f} times as long as one, and {memory[1] / memory[0]:.2f} times "
        f"the peak memory ({memory[1] - memory[0]:.2f} GiB more)."
    )


def agreement(results: Found) -> str:
    """How far the errors are from an exact replay's and from those in float64."""
    lines = [with_replay(name, results) for name in SUBJECTS if name in results]
    found = results.get("float64", {})
    for kind, words in (("default", "the default engine"), ("replay", "an exact replay")):
        if kind in found:
            lines.append(
                f"- {found['title']}: against float64, {found[kind]['compared']} ops over the depth, {words}: "
                f"{far(found[kind])}."
            )
    if "replay" not in found:
        lines.append(f"- {missing(results, 'float64')}")
    return "\n".join(lines)


def with_replay(name: str, results: Found) -> str:
    """Compare the default engine with a replay."""
    found = results[name]
    if "agreement" not in found:
        return f"- {missing(results, name)}"
    compared = found["agreement"]
    cost = Cost([compared["replay"]], found["ops"])
    return (
        f"- {found['title']}: against a replay of all {found['ops']} ops ({number(cost.whole)} forwards per op with "
        f"the set-up): Spearman {compared['spearman']:.6f}; {far(compared)}."
    )


def far(compared: Found) -> str:
    """Name the worst op."""
    if compared["apart"] is None:
        return "no op has an NMSE above 1e-9"
    return f"NMSE {compared['apart']:.1e} apart at most (`{compared['worst']}`)"


def failures(results: Found) -> str:
    """Everything that is not there, and why."""
    lines = [
        f"- {name}: {found['failed']}"
        for name, found in results.items()
        if isinstance(found, dict) and "failed" in found
    ]
    if results.get("missing"):
        lines.append(f"- {results['missing']}")
    lines += [f"- {name}: left out" for name in results["left out"]]
    return "\n".join(lines) or "- No section failed, and none was left out."
