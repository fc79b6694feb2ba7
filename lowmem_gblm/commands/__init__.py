"""What can be asked for, one file a verb; read `commands/prune/pipeline.py` first."""
