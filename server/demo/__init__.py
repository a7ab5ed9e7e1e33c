"""The demonstration: a small real backbone, adapters trained on it, and the string tasks they solve."""
