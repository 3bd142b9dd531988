"""Stands in for flash-attn, which builds with CUDA alone: OpenRLHF imports these names and calls none in the tests."""
