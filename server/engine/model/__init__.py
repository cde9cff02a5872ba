"""Describes a model: what it is, where the embedded one lies, and its fingerprint.

This room imports no engine.
"""
