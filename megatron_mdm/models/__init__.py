"""The transformer, as a list of layers over megatron-core's layers. Never noises, weights or logs."""
