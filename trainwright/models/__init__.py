"""What is computed: plain PyTorch, without process groups or devices."""
