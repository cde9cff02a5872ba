"""Loads a model, and tells where its parts lie.

The loader, the embedded model, a model's fingerprint, its devices and the copies between host and
device. This room imports no other room.
"""
