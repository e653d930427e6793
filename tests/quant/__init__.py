"""Tests of the quantization arithmetic."""
