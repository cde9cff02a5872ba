"""The embedded engine: Hugging Face model definitions under our own continuous batching."""
