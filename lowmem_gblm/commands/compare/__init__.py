"""Comparing methods on one model: `pipeline` is the comparison on one page."""
