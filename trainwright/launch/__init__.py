"""Where it runs: torchrun and its supervisor, SageMaker, EKS, Slurm."""
