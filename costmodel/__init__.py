"""Floor 1: device and network models."""
