"""Run the demo and load the models embedded for it; import from the modules inside."""
