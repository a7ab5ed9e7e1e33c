"""Continuous batching: what runs in which step. Knows tokens, pages and adapters by digest; nothing of gRPC."""
