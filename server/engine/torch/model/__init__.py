"""Loads a model, and tells on which devices its parts are.

It holds the loader, the embedded model, a model's fingerprint, its devices, and the copies between
host and device. This room imports no other room.
"""
