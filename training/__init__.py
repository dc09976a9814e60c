"""The parts of the training loop: trainer, callbacks, resuming, signals, where numbers go."""
