"""Output folders of long work: complete files, locks, checkpoints, provenance; import from the modules inside."""
