"""What the data tools agree on: which files are images, and how thin a box may be."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
"""Endings of image files, in lower case."""

MIN_BOX_SIDE = 1e-3
"""Sides of a box inside of its image, in stored pixels and float32.

The detector refuses sides below 1e-6; between the two lies what resizing takes away, and what float32 rounds off
as a box is moved (6e-5 at x = 1000)."""
