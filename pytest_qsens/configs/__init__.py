"""Quantization configs: which op gets which scheme, read from files of this project and of other tools.

`read.read_config` reads a file into a `rules.Config`; `decisions.decide` tells op by op what it says. Nothing here
knows of pytest, of torch or of the tools that wrote the files.
"""
