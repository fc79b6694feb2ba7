"""The commands, one file a verb; read `commands/prune/pipeline.py` first."""
