"""Nothing: files are opened by PIL."""
