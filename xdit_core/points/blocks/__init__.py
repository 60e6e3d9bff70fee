"""What is done to the blocks of the denoiser while they run."""
