"""Decides which tokens each step computes, and accounts for K/V memory in blocks.

It contains the scheduler and its sequences, the prefix cache and its keys, and the table of the
bank's slots. This package imports no torch, and no other package of the torch engine.
"""
