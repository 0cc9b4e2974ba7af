"""The demo and what is embedded in the package for it; import from the modules inside."""
