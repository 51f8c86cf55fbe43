"""Floor 2: IR to IR."""
