"""The captured graph of a model: capture, op table, alias groups, replay."""
