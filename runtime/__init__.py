"""Floor 1: runs plans; imports `ir` only."""
