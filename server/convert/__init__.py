"""``weft convert``: what others train or save, as adapters that weft serves. Runs offline, never inside a server.

The only place that opens pickles, and it lets them hold nothing but tensors. May import torch and transformers.
"""
