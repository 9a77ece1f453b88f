"""What a training script imports: the session, the seed's two functions, the sampler."""
