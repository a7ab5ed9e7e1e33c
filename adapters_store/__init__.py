"""Adapters: files, formats, operators, versions, residency. Knows no requests, tokens or gRPC."""
