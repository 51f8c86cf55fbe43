"""Floor 0: the language. No torch import here."""
