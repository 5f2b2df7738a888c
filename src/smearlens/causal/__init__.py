"""Experiments on a model: audit, ablation, patching."""
