"""Whether products can be believed, before one is used: self-test, second opinion, planning."""
