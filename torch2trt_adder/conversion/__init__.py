"""convert(): from PyTorch to a checked TensorRT engine, by the route that fits."""
