"""Tests of the proxies and of the command that compares them."""
