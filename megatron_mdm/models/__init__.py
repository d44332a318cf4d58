"""The transformer, as a list of stages over megatron-core's layers. Never noises, weights or logs."""
