"""Turns prompts into token ids, and token ids into text.

Chat templates, incremental text, stop strings, and the vocabulary. This room imports no other room.
"""
