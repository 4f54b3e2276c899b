"""The operator of Daruma: TrainingJobs on Kubernetes, or on this machine."""
