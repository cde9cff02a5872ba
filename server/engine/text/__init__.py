"""Turns prompts into token ids, and token ids into text.

Chat templates, incremental text, stop strings, the end of an answer, and the vocabulary. This room
imports no engine.
"""
