"""What runs leave in storage: stage results, published versions, and garbage collection."""
