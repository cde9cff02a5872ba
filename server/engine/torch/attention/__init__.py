"""Keeps keys and values, and attends over them.

`backend` defines the interface that every kind of memory implements. There are two kinds: slabs
(one a sequence, on any device) and pages (on one GPU). `plan` chooses between them. This package
imports `model`, and the block accounting of `scheduling`.
"""
