"""The documentation: what its pages say is run, and held against the code."""
