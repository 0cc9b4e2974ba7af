"""Evaluate on labelled images; import from the modules inside."""
