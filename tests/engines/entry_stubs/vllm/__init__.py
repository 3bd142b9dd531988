"""Stands in for vLLM, whose version for OpenRLHF needs CUDA: its entry imports these names and the tests call none."""

SamplingParams = None
