"""What is refused before workers start and tests are collected: options that do not go together, and bad files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qsens.collection.catalogue import catalogue
from pytest_qsens.collection.checks import (
    check_interactions,
    check_limits,
    check_ranks,
    check_refinement,
    check_shard,
)
from pytest_qsens.collection.suite import check_selection, selection
from pytest_qsens.errors import QsensError
from pytest_qsens.given_options import base_options, updating
from pytest_qsens.workers import check_distribution

if TYPE_CHECKING:
    import pytest


def check_start(config: pytest.Config) -> None:
    """Check what can be known before anything is collected.

    Raises:
        QsensError: For what cannot work.

    """
    options = base_options(config)
    if options.report is not None and not config.option.collectonly:
        from pytest_qsens.report.directory.write import check_directory

        check_directory(options.report, options.origins["report"])
    if options.model is None:
        for argument in selection(config)[:1]:
            raise QsensError(f"{argument} needs a model: add --qsens-model MODEL")
        return
    if not config.pluginmanager.hasplugin("syrupy"):
        raise QsensError("the scores are compared by syrupy, which is disabled: remove -p no:syrupy")
    check_distribution(config)
    if options.snapshot_prune and not updating(config):
        raise QsensError("--qsens-snapshot-prune removes lines from a snapshot, so it needs --snapshot-update")
    if options.snapshot_prune and options.restricted:
        raise QsensError(
            "--qsens-snapshot-prune removes what was not measured, so it needs a complete run: remove --qsens-ops, "
            "--qsens-max-ops and --qsens-shard"
        )
    if options.json is not None and not config.option.collectonly:
        from pytest_qsens.result_files import check_overwritable

        check_overwritable(options.json)
    if options.gitlab is not None and not config.option.collectonly:
        from pytest_qsens.report.gitlab import check_report

        check_report(options.gitlab)
    model = catalogue(config).model(options)
    check_selection(config, model, options)
    check_shard(model, options)
    check_ranks(config, model, options)
    check_limits(config, model, options)
    check_refinement(model, options)
    check_interactions(options)
