"""The parts of examples/train_lm.py: text, model, stages, optimisation, checkpoints, pictures."""
