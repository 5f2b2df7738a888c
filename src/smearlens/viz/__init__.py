"""Plots, widgets, reports."""
