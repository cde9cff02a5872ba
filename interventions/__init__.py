"""What is stored: manifests, artifacts and the registry that keeps them."""
