"""The serving room: the only one that knows gRPC, Prometheus, tokens, clocks and the backbone."""
