"""Steers vLLM's V2 model runner. It runs by `--vllm-runner v2` only.

Everything that does not depend on the runner is the room's above: the edits, and what is known of
requests.
"""
