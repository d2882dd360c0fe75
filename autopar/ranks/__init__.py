"""Agreement between ranks, and what goes wrong on one told to the others."""
