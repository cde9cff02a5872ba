"""What loads the base model and generates: one protocol, one package an engine."""
