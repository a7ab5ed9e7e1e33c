"""The gRPC services and what stands around them."""
