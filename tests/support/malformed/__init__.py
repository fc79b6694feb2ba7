"""Checkpoints that are malformed, and what each must be refused with."""
