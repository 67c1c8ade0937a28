"""The drill: the same training twice, left alone and with its machines taken from it, and what the difference is."""
