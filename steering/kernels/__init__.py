"""The edits as operators of torch, and their kernels for GPUs."""
