"""What a model of full size takes: python benchmarks/scale.py CHECKPOINT [--json FILE].

Runs pytest on a checkpoint of Qwen2.5-VL-3B (`qsens standin qwen2_5_vl_3b CHECKPOINT` makes one), with 1 and 2 workers
and without, and prints wall time and memory. Memory is the proportional set size, in which a page that several
processes map counts for each with its share, summed over all processes of a run, every other second, its peak reported.
With --limit, the runs are in a control group of that much memory, page cache included (as root).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pytest_qsens.memory import parse_memory
from pytest_qsens.models.resolve import resolve
from pytest_qsens.models.source import ModelRequest
from tests.control_groups import forget, little_memory

if TYPE_CHECKING:
    from tests.control_groups import Group

PRESET = "qwen2_5_vl_3b"
SIDE = 224
"""Pixels of the picture: 64 tokens."""


def write_data(directory: Path) -> dict[str, Path]:
    """Write one sample of a picture and a few words for calibration, and another one for evaluation."""
    files = {}
    for number, name in enumerate(("calib", "eval")):
        picture = Image.effect_noise((SIDE, SIDE), 60 + 20 * number).convert("RGB")
        picture.save(directory / f"{name}.png")
        files[name] = directory / f"{name}.jsonl"
        files[name].write_text(json.dumps({"text": "?!"[number], "image": f"{name}.png"}) + "\n")
    return files


def proportional(process: psutil.Process) -> dict[str, int]:
    """Proportional set size of a process, bytes: in all, and of files."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return {}
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
    return {"all": sizes["Pss"], "files": sizes["Pss_File"]}


def run(arguments: list[str], threads: int | None, group: Group | None) -> dict[str, Any]:
    """Run pytest, in a control group if one is given, and watch its memory."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    enter = () if group is None else group.entry
    start = time.perf_counter()
    with subprocess.Popen(
        [*enter, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        root = psutil.Process(process.pid)
        peak, files, largest = 0, 0, 0
        while process.poll() is None:
            try:
                family = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                break
            found = [sizes for each in family if (sizes := proportional(each))]
            if sum(sizes["all"] for sizes in found) > peak:
                peak = sum(sizes["all"] for sizes in found)
                files = sum(sizes["files"] for sizes in found)
            largest = max([largest, *(sizes["all"] - sizes["files"] for sizes in found)])
            time.sleep(2)  # the system takes up to 0.1 s to tell, for which it stops the process
        output = process.stdout.read() if process.stdout else ""
    return {
        "seconds": time.perf_counter() - start,
        "peak": peak,
        "files": files,
        "largest_private": largest,
        "exit": process.returncode,
        "end": output.strip().splitlines()[-12:],
    }


def told(result: Path) -> dict[str, Any]:
    """Read what a run says of itself."""
    if not result.exists():
        return {}
    document = json.loads(result.read_text())
    found = {key: document["run"][key] for key in ("engine", "cost", "profile")}
    return {"run": found, "measured": sum(op["status"] == "measured" for op in document["ops"])}


def measure(checkpoint: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure every kind of run."""
    found: dict[str, Any] = {"cores": os.cpu_count(), "memory": psutil.virtual_memory().total}
    with (
        tempfile.TemporaryDirectory() as name,
        little_memory(options.limit) if options.limit else nullcontext() as group,
    ):
        directory = Path(name)
        files = write_data(directory)
        request = ModelRequest(PRESET, str(checkpoint), str(files["calib"]), str(files["eval"]))
        found["tokens"] = int(resolve(request).load().evaluation[0]["input_ids"].numel())
        kinds = {"2 workers": (2, None), "1 process, 2 threads": (0, 2), "1 worker, 1 thread": (1, 1)}
        for title, (workers, threads) in kinds.items():
            if options.only and title not in options.only:
                continue
            result = directory / f"{workers}.json"
            chosen = [f"--qsens-ops={glob}" for glob in options.ops]
            chosen += [f"--qsens-memory={options.memory}"] * bool(options.memory)
            arguments = [
                *(f"--rootdir={directory}", f"--qsens-model={PRESET}", f"--qsens-checkpoint={checkpoint}"),
                *(f"--qsens-calib={files['calib']}", f"--qsens-eval={files['eval']}", f"--qsens-json={result}"),
                *(f"--qsens-cache={directory / f'cache{workers}'}", "--qsens-profile", "-n", str(workers), *chosen),
                *(f"--qsens-snapshot-dir={directory / f'snapshots{workers}'}", "--snapshot-update"),
                str(directory),
            ]
            if group is not None:
                forget(checkpoint)
            kind = run(arguments, threads, group) | told(result)
            if options.again:  # with what is known of the model and no score: what a worker does before its first op
                shutil.rmtree(directory / f"cache{workers}" / "results")
                again = [argument for argument in arguments if not argument.startswith("--qsens-ops=")]
                kind["again"] = run([*again, f"--qsens-ops={options.again}"], threads, group) | told(result)
            found[title] = kind
            print(title, json.dumps(kind, indent=1), flush=True)
            if options.json:
                options.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


def main() -> None:
    """Read the command line, and measure."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--only", nargs="*", metavar="KIND")
    parser.add_argument("--ops", nargs="*", default=[], metavar="GLOB", help="only these")
    parser.add_argument("--again", metavar="GLOB", help="then run these ops once more, with the artifact but no scores")
    parser.add_argument("--memory", metavar="SIZE", help="for values, of each worker (--qsens-memory)")
    parser.add_argument(
        "--limit", type=lambda text: parse_memory(text, "--limit"), metavar="SIZE", help="of a control group"
    )
    options = parser.parse_args()
    measure(options.checkpoint.resolve(), options)


if __name__ == "__main__":
    main()
