"""Statistics of a resident block, gathered at its tap: one file each.

A statistic observes the multiplications of every calibration sample, one sample at a time, and then
answers for each slot. Accumulators are float32 and lie where the block lies.
"""
