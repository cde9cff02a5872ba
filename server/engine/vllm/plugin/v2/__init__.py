"""Steers vLLM's V2 model runner, which vLLM uses with `--vllm-runner v2` only.

The edits, and what a worker knows of its requests, are those of `server.engine.vllm.plugin`.
"""
