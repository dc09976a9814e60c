"""What is measured of models and texts, and the files that it goes to."""
