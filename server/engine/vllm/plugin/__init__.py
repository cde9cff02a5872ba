"""Steers inside vLLM's workers: sites, banks, routes, and the worker classes that vLLM loads.

A worker process imports this room. It imports torch, vLLM, safetensors and `steering`, and nothing
else of ours; `sites` and `wire`, which the service imports too, import no vLLM.
"""
