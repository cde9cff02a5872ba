"""The commands of `steerserve`."""
