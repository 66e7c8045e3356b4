"""`kvbench search`: which scheme of a budget's bytes loses least, its keys, values and layers each stored apart."""
