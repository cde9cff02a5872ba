"""The embedded engine: runs Hugging Face models under its own continuous batching."""
