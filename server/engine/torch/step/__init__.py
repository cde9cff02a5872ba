"""Builds one step's tensors and its route, and runs the model on them.

`batch` makes the tensors from the scheduler's chunks, `runner` and `staged_runner` call the model,
whose layers `decoder` may hand to faster ones. This room imports `attention`, `scheduling` and
`model`.
"""
