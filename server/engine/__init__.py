"""Holds the engines, which load the base model and generate: one protocol, one package each."""
