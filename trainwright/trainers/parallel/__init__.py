"""How a plan is carried out on a mesh of ranks."""
