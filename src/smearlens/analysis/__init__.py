"""Pure functions from activations to numbers; knows no model."""
