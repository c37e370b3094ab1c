"""The stages of the study: what is made once, and the training and the measures of each run.

Training resumes from its checkpoints. Everything else is short and starts anew.
"""
