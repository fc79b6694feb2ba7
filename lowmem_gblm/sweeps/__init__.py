"""The passes over the decoder blocks: dense (and head), reverse, prune; rehearsal, in place."""
