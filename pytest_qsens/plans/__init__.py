"""Which scheme for which op: plans from measured scores, under a budget of size or error."""
