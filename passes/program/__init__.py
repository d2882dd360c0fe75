"""What all stages read and write: the step, whole and of one rank, as torch.fx graphs, and ways through them."""
