"""How attention evolves while a character model is trained, and what it writes."""
