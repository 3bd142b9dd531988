"""Matched comparisons of objectives: `cfpo study study.yaml`."""
