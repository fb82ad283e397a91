"""How a score falls as the test data move away from the training data."""
