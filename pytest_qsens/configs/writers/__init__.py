"""Writers of quantization configs: from ops and their schemes to the values of a file, one module a format."""
