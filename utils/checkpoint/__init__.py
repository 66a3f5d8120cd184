"""What survives a crash: the training state in files, and the weights of others."""
