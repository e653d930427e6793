"""Files written when a run is over, beside its snapshots: results and reports; and the cache, kept in its size."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_qsens.cache import trim
from pytest_qsens.errors import QsensError, told
from pytest_qsens.files import write_atomically
from pytest_qsens.given_options import base_options
from pytest_qsens.memory import parse_memory
from pytest_qsens.session.result import result_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pytest_qsens.options import Options
    from pytest_qsens.session.controller import Controller
    from pytest_qsens.session.run import Run


def write_results(controller: Controller, run: Run) -> None:
    """Write the result file, if one is asked for."""
    from pytest_qsens.result_files import write

    path = base_options(controller.config).json
    if path is not None:
        write(path, result_of(run, controller.config, controller.wall_seconds))
        controller.written[path] = ""


def write_gitlab(controller: Controller, active: Sequence[Run]) -> None:
    """Write GitLab's report of what got worse in these runs, if one is asked for."""
    path = base_options(controller.config).gitlab
    if path is None:
        return
    from pytest_qsens.report.gitlab import code_quality

    root = Path(os.environ.get("CI_PROJECT_DIR") or controller.config.rootpath)
    write_atomically(path, code_quality(active, root))
    controller.written[path] = ""


def write_directory(controller: Controller, run: Run, session: pytest.Session) -> None:
    """Write the report with charts, if one is asked for."""
    options = base_options(controller.config)
    if options.report is not None:
        from pytest_qsens.report.directory.of_run import report_of
        from pytest_qsens.report.directory.write import write_report

        interrupted = session.exitstatus == pytest.ExitCode.INTERRUPTED
        try:
            write_report(options.report, report_of(controller, run, interrupted=interrupted))
        except QsensError:
            raise
        except Exception as error:  # scores are written, the summary is yet to come: worth more than a picture
            raise QsensError(f"no report could be made: {told(error)}") from error
        controller.written[options.report / "report.html"] = ""


def trim_cache(runs: Iterable[Run], options: Options) -> None:
    """Keep the cache within its size, by what was not used for the longest time."""
    cache_dir = options.cache_dir()
    used = {Path(path) for run in runs for facts in run.facts for path in facts["used"]}
    if cache_dir is not None and used:
        trim(cache_dir, parse_memory(options.cache_size, "cache_size"), used)
