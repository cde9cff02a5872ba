"""How toxic completions are: scorers in a process of their own, and the queue in front of them."""
