"""Everything Trimtab decides, as pure functions: no I/O, clock, randomness, logging, third party."""
