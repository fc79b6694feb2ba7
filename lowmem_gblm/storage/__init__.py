"""Files: reading a checkpoint, writing the pruned one, and what lies in the work folder between."""
