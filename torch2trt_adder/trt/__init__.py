"""TensorRT: the plugin, builds, engines."""
