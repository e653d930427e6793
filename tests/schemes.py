"""Schemes that tests go through."""

INTEGER = ("w8a8", "w8a8_static", "w8a8_dynamic")
"""Products of integers: exact, however many rows go together."""
