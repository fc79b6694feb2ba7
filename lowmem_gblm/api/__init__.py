"""The Python API: a function for every command."""
