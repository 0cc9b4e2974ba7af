"""Datasets, collators, corruptions and procedural scenes; import from the modules inside."""
