"""What differs between jobs."""
