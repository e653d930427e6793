"""Tests of the engines against Intel Neural Compressor itself; they need it installed."""
