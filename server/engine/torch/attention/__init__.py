"""Keeps keys and values, and attends over them.

`backend` says what every kind of memory gives: slabs (one a sequence, on any device) and pages (in
one GPU's memory). `plan` chooses between them. This room imports `model`, and the books of
`scheduling`.
"""
