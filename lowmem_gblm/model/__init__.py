"""The model without its weights: its own forward around one resident decoder block."""
