"""Floor 3: Triton sources and binaries."""
