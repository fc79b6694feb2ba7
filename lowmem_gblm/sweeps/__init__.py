"""The passes over the decoder blocks: dense (and head), reverse, prune, and a rehearsal in place."""
