"""Hybrids, contexts longer than those trained on, and what a full-size run costs."""
