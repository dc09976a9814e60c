"""Samplers: from a denoiser to token ids. They know nothing of Lightning or Hydra."""
