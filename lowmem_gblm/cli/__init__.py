"""The command line: arguments, the console, streams that may be gone."""
