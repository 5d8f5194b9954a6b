"""Weights & Biases and TensorBoard, each with every metric once per step."""
