"""What measuring an op costs, in forwards: python benchmarks/performance.py [--quick] [--json FILE] [--inc PYTHON].

Prints tables and writes JSON; with --page, also docs/performance.md. Every section runs in a process of its own, so
that its peak memory is its own, and one that fails takes nothing else with it. Intel Neural Compressor needs numpy 1:
its sections run if the environment has the extra ``inc``, or in the one whose Python ``--inc`` names.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

Found = dict[str, Any]

TEMPLATE = Path(__file__).parent / "performance.md.in"
MISSING = (
    "neural-compressor is not installed, and nothing is compared with it. Install the extra `inc`, or give --inc the "
    "Python of an environment that has it."
)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="only try it: small sizes, few ops, one round, not all sections"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured (performance.json)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page")
    parser.add_argument("--read", type=Path, metavar="FILE", help="start with what an earlier run wrote")
    parser.add_argument("--only", nargs="*", metavar="SECTION", help="measure these sections; with none, only print")
    parser.add_argument("--inc", metavar="PYTHON", help="python of an environment with neural-compressor")
    parser.add_argument("--layers", type=int, help="of the text model (24)")
    parser.add_argument("--long-layers", type=int, help="of the text model at more than 1000 tokens (12)")
    parser.add_argument("--few", type=int, help="ops that stand for all where one costs a forward or more (8)")
    parser.add_argument("--repeats", type=int, help="rounds whose median is reported (3)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (2)")
    parser.add_argument("--section", help=argparse.SUPPRESS)  # what a process of ours is to measure
    found = parser.parse_args(arguments)
    sizes = {"layers": (24, 2), "long_layers": (12, 2), "few": (8, 2), "repeats": (3, 1)}
    for name, (full, quick) in sizes.items():
        if getattr(found, name) is None:
            setattr(found, name, quick if found.quick else full)
    found.json = found.json or Path("performance.json")
    return found


def measure_section(options: argparse.Namespace) -> None:
    """Measure one section, and keep what there is in the file at any time."""
    import warnings

    import torch
    from sections import Options, sections

    from pytest_qsens.threads import reproducible_sums

    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.section != "rates":  # what the machine can do does not depend on what we ask of it
        reproducible_sums()
    names = ("layers", "long_layers", "few", "repeats", "threads", "quick")
    chosen = Options(**{name: getattr(options, name) for name in names})
    found: Found = {}
    for part in sections(quick=options.quick)[options.section](chosen):
        found |= part
        options.json.write_text(json.dumps(found))


def in_process(name: str, options: argparse.Namespace, python: str) -> Found:
    """Measure a section in a process of its own; says in ``failed`` how it ended, if it failed."""
    file = options.json.with_suffix(f".{name}.part")
    command = [python, __file__, "--section", name, "--json", str(file)]
    for size in ("layers", "long_layers", "few", "repeats", "threads"):
        command += [f"--{size.replace('_', '-')}", str(getattr(options, size))]
    command += ["--quick"] * options.quick
    start = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    ended = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    found: Found = json.loads(file.read_text()) if file.exists() else {}
    file.unlink(missing_ok=True)
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or [""])[-1]
        found["failed"] = last if ended.returncode > 0 else f"killed by signal {-ended.returncode}"
    return found | {"seconds": time.perf_counter() - start}


def measure(options: argparse.Namespace, results: Found) -> None:
    """Measure all sections, or those that are asked for."""
    from sections import NOT_QUICK, sections
    from timing import machine

    known = sections(quick=options.quick)
    if unknown := set(options.only or ()) - known.keys():
        raise SystemExit(f"no section {', '.join(sorted(unknown))}. Known: {', '.join(known)}")
    own = machine() | {"threads": options.threads}
    if results.setdefault("machine", own) != own:
        raise SystemExit(f"{options.read} is from another machine or environment: {results['machine']}, here {own}")
    chosen = options.only or [name for name in known if not options.quick or name not in NOT_QUICK]
    python = options.inc or sys.executable
    has_inc = options.inc is not None or importlib.util.find_spec("neural_compressor") is not None
    results["missing"] = None if has_inc or any(name.startswith("inc-") for name in results) else MISSING
    for name in known:
        compares = name.startswith("inc-")
        if name not in chosen or (compares and not has_inc):
            continue
        print(f"{name} …", file=sys.stderr, flush=True)
        results[name] = in_process(name, options, python if compares else sys.executable)
        if "failed" in results[name]:
            print(f"{name} failed: {results[name]['failed']}", file=sys.stderr, flush=True)
        results["options"] = {
            size: getattr(options, size) for size in ("layers", "long_layers", "few", "repeats", "threads", "quick")
        }
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    """Measure, print, and write."""
    options = parse(sys.argv[1:])
    if options.section:
        measure_section(options)
        return
    results: Found = json.loads(options.read.read_text()) if options.read else {}
    if options.only != []:
        measure(options, results)
    from sections import sections
    from tables import page, printed

    results["left out"] = [name for name in sections(quick=results["options"]["quick"]) if name not in results]
    print(printed(TEMPLATE.read_text(), results))
    if options.page:
        options.page.write_text(page(TEMPLATE.read_text(), results))
        print(f"wrote {options.page}")


if __name__ == "__main__":
    main()
