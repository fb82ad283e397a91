"""Products with H, G and R: the function that is measured, and every method to differentiate it."""
