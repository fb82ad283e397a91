"""One module for each kind of data that has a name."""
