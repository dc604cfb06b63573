"""What is generated from the spec models: JSON Schema and reference."""
