"""How commands present results to people and programs."""
