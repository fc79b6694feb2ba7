"""The passes over the decoder blocks: dense (and head), reverse, prune; dry run, in place."""
