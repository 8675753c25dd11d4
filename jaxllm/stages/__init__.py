"""The stages of a model's life. A stage never imports another stage; the run directory is their contract."""
