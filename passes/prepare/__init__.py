"""Programs that compute the same and can be split better: a file per change."""
