"""Implement the methods that an evaluation compares; import from the modules inside."""
