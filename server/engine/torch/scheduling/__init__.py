"""Decides which tokens each step computes, and accounts for K/V memory in blocks.

The scheduler, the sequences that it knows, the prefix cache's keys and copies, and the slots of the
bank. This room imports no torch and no other room.
"""
