"""How it is trained: the loop, and what the loop is made of."""
