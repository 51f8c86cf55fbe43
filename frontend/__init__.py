"""Floor 4: from torch to the logical IR, the driver, the command line."""
