"""Whether the nodes are fit to train on, asked before the first step."""
