"""One module for each kind of model that has a name."""
