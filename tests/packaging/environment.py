"""Environments with the wheel and its dependencies, in the lowest or the newest versions that it allows."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from email.parser import HeaderParser
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement

EXTRAS = ("xdist", "report")
_CUDA = ("nvidia-", "cuda-", "triton")


@dataclass(frozen=True)
class Environment:
    """A virtual environment, and an empty directory to run its programs in."""

    directory: Path
    work: Path

    def run(self, program: str, *arguments: str, code: int = 0) -> str:
        """Run one of its programs away from any checkout; returns what it prints."""
        kept = _surroundings() | {"PATH": f"{self.directory / 'bin'}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "120"}
        command = [str(self.directory / "bin" / program), *arguments]
        done = subprocess.run(command, cwd=self.work, env=kept, capture_output=True, text=True, check=False)
        assert done.returncode == code, f"{command} ended with {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout


def create(wheel: Path, directory: Path, constraints: list[str]) -> Environment:
    """Install the wheel, nothing else, under these constraints. torch is that of this environment, linked.

    Raises:
        subprocess.CalledProcessError: If pip cannot do it; ``stdout`` says why.

    """
    place = directory / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True, capture_output=True)
    linked = _link_torch(place / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages")
    limits = directory / "constraints.txt"
    limits.write_text("\n".join([*linked, *constraints]) + "\n")
    target = f"pytest-qsens[{','.join(EXTRAS)}] @ {wheel.as_uri()}"
    pip = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", "-c", str(limits), target]
    subprocess.run(pip, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=_surroundings())
    work = directory / "work"
    work.mkdir()
    return Environment(place, work)


def lowest(wheel: Path) -> list[str]:
    """Take for every dependency the lowest version that the wheel's metadata allow."""
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    found = []
    for text in metadata.get_all("Requires-Dist", []):
        requirement = Requirement(text)
        wanted = requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in EXTRAS)
        if wanted and requirement.name != "torch":
            (version,) = (part.version for part in requirement.specifier if part.operator == ">=")
            found.append(f"{requirement.name}=={version}")
    return found


def _surroundings() -> dict[str, str]:
    """Leave out what would bring in a checkout, or what this run of pytest was told."""
    outside = ("PYTHON", "PYTEST_", "CI", "QSENS_")
    return {name: value for name, value in os.environ.items() if not name.startswith(outside)}


def _link_torch(site_packages: Path) -> list[str]:
    """Link torch and the CUDA packages that its build comes with, if any: gigabytes that the test is not about."""
    parts = [distribution("torch")]
    for part in parts:  # grows while it is read: what comes with CUDA needs more of the kind
        names = {Requirement(text).name for text in part.requires or ()}
        known = {other.name for other in parts}
        parts += [distribution(name) for name in sorted(names - known) if name.startswith(_CUDA) and _installed(name)]
    linked = set()
    for part in parts:
        for top in _top_level(part):
            target = Path(str(part.locate_file(top)))
            if top not in linked and target.exists():
                (site_packages / top).symlink_to(target)
                linked.add(top)
    return [f"{part.name}=={part.version}" for part in parts]


def _installed(name: str) -> bool:
    return any(True for _ in distributions(name=name))


def _top_level(part: Distribution) -> set[str]:
    if part.files is None:
        raise PackageNotFoundError(f"{part.name} has no list of its files")
    return {path.parts[0] for path in part.files if path.parts[0] not in ("..", "__pycache__")}
