"""Torch operators for the edits, and their Triton kernels for GPUs."""
