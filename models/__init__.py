"""The denoising network and its parts."""
