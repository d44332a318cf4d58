"""Reinforcement learning of masked diffusion models: rollouts, rewards, estimators, and a source of batches of them."""
