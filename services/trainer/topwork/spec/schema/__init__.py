"""Documentation generated from the spec models: the JSON Schema and the reference."""
