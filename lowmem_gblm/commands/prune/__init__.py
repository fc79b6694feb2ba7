"""Pruning a model: `pipeline` is the run on one page."""
