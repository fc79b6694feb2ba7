"""Files: reading a checkpoint, writing the pruned checkpoint, and the work folder of a job."""
