"""Model weights in files: the model folder, the original repository's files, the model card."""
