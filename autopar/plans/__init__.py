"""What people do with a plan: read it, ask it why, measure it, leave with it."""
