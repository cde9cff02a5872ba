"""Turns a step's logits into the next tokens, and into what each client gets.

The sampler, penalties, log-probabilities, and the answers that they become. This room imports
`step`, `text`, `scheduling` and `model`.
"""
