"""A folder of safetensors: reading it, writing the pruned one, checking both."""
