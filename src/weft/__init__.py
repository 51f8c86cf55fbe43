"""weft: weave a one-device PyTorch program across a cluster."""
