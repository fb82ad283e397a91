"""Problem -> products on blocks of vectors: the only room that calls autograd."""
