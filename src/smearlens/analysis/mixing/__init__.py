"""Mixing matrices: what each layer applies over positions, and statistics of their rows."""
