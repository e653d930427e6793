"""Why an op is sensitive: its ranges, what quantizing loses, which part of it and where the error is."""
