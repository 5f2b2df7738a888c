"""Models: one file each, on the frame of `base` and `decoder`."""
