"""Quantization schemes and their exact simulation."""
