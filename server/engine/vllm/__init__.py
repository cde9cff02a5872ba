"""The engine on vLLM: the HTTP service in front, vLLM's workers behind, our edits inside them."""
