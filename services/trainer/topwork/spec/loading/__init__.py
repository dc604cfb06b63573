"""Reading job specs: YAML with positions, overrides, defaults and error messages."""
