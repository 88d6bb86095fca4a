"""What comes out: export, generate, serve, evaluate, and retrieval on top."""
