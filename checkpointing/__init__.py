"""Files of weights: read as data, compared with a run, loaded, converted, written whole."""
