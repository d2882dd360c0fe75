"""Where Inductor would make wrong numbers of these graphs, with no error: a file per mistake says which releases do."""
