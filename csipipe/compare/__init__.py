"""Several models and codeword sizes on the same data, seed and budget: table and picture."""
