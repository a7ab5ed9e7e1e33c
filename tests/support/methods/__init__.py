"""Adapters of every method that is served, on tiny models, each beside an oracle that was written apart from weft."""
