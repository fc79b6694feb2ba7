"""The sweeps over the decoder blocks: dense, head, reverse, prune, and the dry run."""
