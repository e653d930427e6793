"""Quantization configs: the readers of all formats, and the command."""
