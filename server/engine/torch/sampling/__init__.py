"""Turns a step's logits into the next tokens, and into each client's outputs.

It holds the sampler, the penalties, the log-probabilities and each sequence's outputs. This room
imports `step`, `text`, `scheduling` and `model`.
"""
