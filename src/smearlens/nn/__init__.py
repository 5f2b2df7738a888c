"""Hooked building blocks: attention, convolution, state-space layers, positions."""
