"""The needs of a run, by arithmetic alone: choices, bytes, FLOPs, seconds; or a refusal."""
