"""Loads a model, and tells on which devices its parts are.

It holds the loader, a model's devices, and the copies between host and device. This room imports no
other room of the torch engine.
"""
