"""Cheap stand-ins for exact scores, and how well each ranks the ops of a model."""
