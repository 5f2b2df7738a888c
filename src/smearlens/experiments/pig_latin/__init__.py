"""Pig Latin by an encoder-decoder transformer and by Mamba."""
