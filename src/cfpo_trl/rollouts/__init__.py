"""Rollouts by vLLM: the server of a recipe, its health, weights without NCCL, and failures."""
