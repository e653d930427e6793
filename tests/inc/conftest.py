"""What the tests against Intel Neural Compressor share."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import neural_compressor  # noqa: F401 - without it, asking for these tests is an error, not a skip
