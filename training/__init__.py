"""What a training run needs beside the model: callbacks and checkpoints."""
