"""Builds one step's tensors and its route, and runs the model on them.

`batch` makes the tensors from the scheduler's chunks. `runner` and `staged_runner` call the model.
`decoder` lets faster code compute the model's layers. This package imports `attention`,
`scheduling` and `model`.
"""
