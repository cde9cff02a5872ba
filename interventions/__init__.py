"""Stores interventions: their manifests, their artifacts, and the registry that keeps them."""
