"""Triton kernels of the decoder, each beside the same in plain torch: what the tests hold it against, in float64."""
