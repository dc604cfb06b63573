"""Objects that runs store: stage results, published versions, and their garbage collection."""
