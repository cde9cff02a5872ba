"""Scores how toxic completions are: scorers in a process of their own, and a queue before them."""
