"""How what was found looks: one file a format, each with the one function that makes a name harmless in it."""
