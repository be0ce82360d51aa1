"""The parts of examples/train_lm.py: text, model, optimisation, checkpoints, pictures."""
