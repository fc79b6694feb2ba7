"""A pretended accelerator, in pure Python: the device "pretend", whose numbers a CPU computes.

It finds what goes unnoticed without a GPU: tensors on two devices in one operation; copies that are
used before they arrive; memory that is reused while another stream reads it; copies that cannot run
beside the computation; waits of the computing thread; and more memory than was planned.

It changes torch for the complete process, so tests run it in processes of their own (`run.py`).
"""
