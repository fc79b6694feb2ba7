"""This process and this machine: memory, speed, signals, threads, progress."""
