"""Texts, tokenizers, synthetic tasks and batches: everything that a model reads."""
