"""Fixtures of quantization."""

from __future__ import annotations

from typing import Any

import pytest

from tests.installed import needed
from tests.quant.questions import ask


@pytest.fixture(scope="session")
def modelopt(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Answers of ModelOpt."""
    needed("modelopt")
    return ask(tmp_path_factory.mktemp("modelopt"))
